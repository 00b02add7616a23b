"""``tempo-megatron data``: prepare, list, contamination, generate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tempo_megatron.errors import TempoError

EXIT_OVERLAP = 3

ROLES = {
    "labeled": "D_L: answers train",
    "unlabeled": "D_U: answers are neither read nor written",
    "eval": "answers, but not for training",
}

EXAMPLES = """examples:
  tempo-megatron data list
  tempo-megatron data prepare dapo-math-17k --input dapo-math-17k.parquet --output d_l.parquet --labeled
  tempo-megatron data prepare aime2024 --input aime_2024/train-*.parquet --output d_u.parquet --unlabeled
  tempo-megatron data prepare aime2024 --input aime_2024/train-*.parquet --output aime24_eval.parquet --eval
  tempo-megatron data prepare bbh --input bbh/*/test-*.parquet --output bbh.parquet --eval --skip-bad
  tempo-megatron data contamination --labeled d_l.parquet --unlabeled d_u.parquet --held-out aime26.parquet
  tempo-megatron data generate knights_knaves gcd --count 500 --seed 1 --output tasks.parquet --labeled
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of ``data``; each sets ``action`` to its function, which returns the exit code."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_prepare(actions.add_parser("prepare", help="files of a public data set -> prompt parquet"))
    actions.add_parser("list", help="the data sets that can be prepared").set_defaults(action=_list)
    _add_contamination(actions.add_parser("contamination", help="problems that D_L, D_U and held-out sets share"))
    _add_generate(actions.add_parser("generate", help="prompts from reasoning-gym's task generators"))


def _add_role(parser: argparse.ArgumentParser) -> None:
    role = parser.add_mutually_exclusive_group(required=True)
    for name, text in ROLES.items():
        role.add_argument(f"--{name}", dest="role", action="store_const", const=name, help=text)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="see: tempo-megatron data list")
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help=".parquet, .jsonl(.gz), .json, .csv",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="OUT.parquet")
    _add_role(parser)
    parser.add_argument("--template", metavar="NAME|FILE", help="default: the one that suits the answers")
    parser.add_argument("--answer-type", metavar="KIND", help="of data sets that may have any; default: by the answers")
    parser.add_argument("--source", metavar="TEXT", help="of the records; default: the file's own, else NAME")
    parser.add_argument("--limit", type=int, metavar="N", help="records at most")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="order of GPQA's options; default: 0")
    parser.add_argument("--skip-bad", action="store_true", help="leave rows out that cannot be used, and count them")
    parser.add_argument("--keep-duplicates", action="store_true", help="keep problems that come more than once")
    parser.set_defaults(action=_prepare)


def _add_contamination(parser: argparse.ArgumentParser) -> None:
    for group, text in (("labeled", "D_L"), ("unlabeled", "D_U"), ("held-out", "sets that are never trained on")):
        parser.add_argument(
            f"--{group}", nargs="+", action="extend", default=[], metavar="FILE", help=f"{text}, prompt parquet"
        )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="all matches")
    parser.add_argument("--ngram", type=int, default=6, metavar="N", help="tokens of a sequence; default: 6")
    parser.add_argument("--threshold", type=float, default=0.6, metavar="X", help="shared sequences; default: 0.6")
    parser.add_argument("--fail-on-overlap", action="store_true", help="exit code 3 when two groups share a problem")
    parser.set_defaults(action=_contamination)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="such as gcd or knights_knaves")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="prompts of each task")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--output", required=True, type=Path, metavar="OUT.parquet")
    _add_role(parser)
    parser.add_argument("--template", metavar="NAME|FILE", help="default: text")
    parser.set_defaults(action=_generate)


def _prepare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from tempo_megatron.data.prepare.layouts import Settings
    from tempo_megatron.data.prepare.pipeline import Options, prepare
    from tempo_megatron.data.prepare.registry import data_set
    from tempo_megatron.data.prepare.summary import print_summary

    if arguments.limit is not None and arguments.limit < 1:
        raise TempoError(f"command line: --limit {arguments.limit} must be at least 1")
    options = Options(
        role=arguments.role,
        source=arguments.source,
        answer_type=arguments.answer_type,
        template=arguments.template,
        limit=arguments.limit,
        skip_bad=arguments.skip_bad,
        keep_duplicates=arguments.keep_duplicates,
        settings=Settings(seed=arguments.seed),
    )
    summary = prepare(data_set(arguments.name), arguments.input, arguments.output, options)
    print_summary(summary, arguments.name, arguments.output, arguments.role, Console())
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from tempo_megatron.data.prepare.registry import DATA_SETS
    from tempo_megatron.data.prepare.summary import print_data_sets

    print_data_sets(DATA_SETS.values(), Console())
    return 0


def _contamination(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from tempo_megatron.data.contamination import find_overlap, read_entries
    from tempo_megatron.data.prepare.records import check_output, write_atomically
    from tempo_megatron.data.prepare.summary import print_overlap

    groups = {"labeled": arguments.labeled, "unlabeled": arguments.unlabeled, "held-out": arguments.held_out}
    if arguments.output is not None:
        check_output(arguments.output, [file for files in groups.values() for file in files])
    entries = [entry for group, files in groups.items() for entry in read_entries(group, files)]
    if not entries:
        raise TempoError("data contamination: no files given; expected --labeled, --unlabeled or --held-out")
    report = find_overlap(entries, ngram=arguments.ngram, threshold=arguments.threshold)
    print_overlap(report, Console())
    if arguments.output is not None:
        text = json.dumps(report.as_json(), indent=2, ensure_ascii=False)
        write_atomically(arguments.output, lambda partial: partial.write_text(f"{text}\n", encoding="utf-8"))
    return EXIT_OVERLAP if arguments.fail_on_overlap and report.between_groups() else 0


def _generate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from tempo_megatron.data.prepare.generate import generate
    from tempo_megatron.data.prepare.summary import print_summary

    summary = generate(
        arguments.tasks, arguments.count, arguments.seed, arguments.output, arguments.role, arguments.template
    )
    print_summary(summary, "reasoning-gym", arguments.output, arguments.role, Console())
    return 0
