"""The methods once more, as slowly and plainly as possible: transformers' models, one row at a time, torch's AdamW.

Nothing of the project's arithmetic is used here. From what a run sampled, ``replay`` computes its updates anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from tempo_megatron.config.schema import Config

Rows = list[Tensor]  # one tensor per row, of its own length


class PlainModel:
    """A transformers model with an AdamW as the config wants it."""

    def __init__(self, module: Any, settings: Any) -> None:
        self.module, self.settings = module.float().eval(), settings
        self.optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.grad_clip)
        self.optimizer.step()


class Replay:
    """One run, from its first weights on."""

    def __init__(self, config: Config, actor_dir: Path, critic_dir: Path | None, truth: dict[str, str]) -> None:
        self.config, self.truth = config, truth
        self.actor = PlainModel(AutoModelForCausalLM.from_pretrained(actor_dir), config.actor.optimizer)
        self.critic: PlainModel | None = None
        if config.critic is not None:
            critic = AutoModelForTokenClassification.from_pretrained(critic_dir, num_labels=1)
            self.critic = PlainModel(critic, config.critic.optimizer)

    def step(
        self,
        samples: dict[str, Any],
        critic_parts: Iterable[Tensor],
        policy_parts: Iterable[Tensor],
        coins: Tensor | None,
    ) -> None:
        """One EM step; the parts are the row positions of each optimizer step, among the critic's and the policy's
        own rows.
        """
        self.samples = samples
        estep, mstep = self.config.algorithm.estep, self.config.algorithm.mstep
        count = len(samples["tokens"])
        values: Rows = []
        if self.critic is not None and estep.order == "after_values":
            values = [v.detach() for v in self.values(range(count))]
        if self.critic is not None:
            self.recalibrate([i for i in range(count) if samples["for_critic"][i]], critic_parts)
        chosen = self.policy_rows()
        if self.critic is not None and estep.order == "before":
            values = [v.detach() for v in self.values(range(count))]
        rewards = self.rewards(chosen, values, coins)
        advantages = self.advantages(chosen, rewards, values)
        with torch.no_grad():
            old = self.log_probs(chosen)
        for part in policy_parts:
            at = part.tolist()
            new = self.log_probs([chosen[k] for k in at])
            losses = [
                self.policy_loss(n, old[k], advantages[k]) * self.correction(old[k], self.sampled(chosen[k]))
                for n, k in zip(new, at, strict=True)
            ]
            self.actor.step(self.mean(losses, mstep.loss_agg))

    def policy_rows(self) -> list[int]:
        both = self.config.algorithm.mstep.rows == "all" or not self.has_d_u
        return [
            i
            for i, chosen in enumerate(self.samples["for_actor"])
            if chosen and (both or not self.samples["labeled"][i])
        ]

    def sampled(self, i: int) -> Tensor:
        """The sampler's log-probabilities of row i's tokens."""
        return self.samples["log_probs"][i, : len(self.samples["tokens"][i])]

    @property
    def has_d_u(self) -> bool:
        return self.config.data.unlabeled_prompts_per_step > 0

    # ------------------------------------------------------------ models, row by row

    def log_probs(self, rows: Iterable[int]) -> Rows:
        found = []
        for i in rows:
            prompt, response = self.samples["prompts"][i], self.samples["tokens"][i]
            logits = self.actor.module(torch.tensor([prompt + response])).logits[0] / self.config.rollout.temperature
            table = logits[len(prompt) - 1 : -1].log_softmax(-1)
            found.append(table[range(len(response)), response])
        return found

    def heads(self, rows: Iterable[int]) -> Rows:
        """The critic's output after the last prompt token and after each response token."""
        assert self.critic is not None
        found = []
        for i in rows:
            prompt, response = self.samples["prompts"][i], self.samples["tokens"][i]
            found.append(self.critic.module(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :, 0])
        return found

    def values(self, rows: Iterable[int]) -> Rows:
        heads = self.heads(rows)
        return [h.sigmoid() for h in heads] if self.config.critic.head == "sigmoid" else heads  # type: ignore[union-attr]

    # ------------------------------------------------------------ E-step

    def recalibrate(self, rows: list[int], parts: Iterable[Tensor]) -> None:
        assert self.critic is not None and self.config.critic is not None
        estep, last = self.config.algorithm.estep, self.config.algorithm.mstep.terminal_value == "post_last"
        old = [v.detach() for v in self.values(rows)]
        for part in parts:
            losses = []
            at = part.tolist()
            for k, head in zip(at, self.heads([rows[k] for k in at]), strict=True):
                y = float(self.samples["outcome"][rows[k]])
                states = len(head) if last else len(head) - 1
                head, before = head[:states], old[k][:states]
                if self.config.critic.head == "sigmoid":
                    losses.append(-(head.sigmoid() if y == 1 else 1 - head.sigmoid()).log())
                    continue
                squared = (head - y) ** 2
                if estep.value_clip is not None:
                    shift = (head - before).mean()
                    clipped = head - shift + shift.clamp(-estep.value_clip, estep.value_clip)
                    squared = torch.maximum(squared, (clipped - y) ** 2)
                losses.append(0.5 * squared)
            self.critic.step(self.mean(losses, estep.loss_agg))

    @staticmethod
    def mean(losses: Rows, loss_agg: str) -> Tensor:
        return torch.cat(losses).mean() if loss_agg == "token-mean" else torch.stack([x.mean() for x in losses]).mean()

    # ------------------------------------------------------------ rewards and advantages

    def answer(self, i: int) -> str | None:
        """The guess of a well-formed ``x;y+`` response."""
        text = self.samples["texts"][i]
        ok = len(text) == 6 and text[2] == ";" and text[5] in "+-" and set(text[:2] + text[3:5]) <= set("0123456789abc")
        return text[:2] if ok else None

    def rewards(self, rows: list[int], values: Rows, coins: Tensor | None) -> list[float]:
        mstep, found = self.config.algorithm.mstep, []
        for k, i in enumerate(rows):
            if self.samples["labeled"][i]:
                found.append(float(self.samples["outcome"][i]))
            elif self.config.stage == "tempo":
                v = float(values[i][-1 if mstep.terminal_value == "post_last" else -2])
                found.append(min(max(v, 0.0), 1.0) if mstep.clamp_terminal else v)
            elif self.config.stage == "oracle":
                found.append(float(self.answer(i) == self.truth[self.samples["ids"][i]]))
            elif self.config.stage == "random":
                assert coins is not None
                found.append(float(coins[k]))
            else:
                found.append(self.agreement(i))
        if (penalty := self.config.algorithm.reward_terms.length_penalty) is not None:
            for k, i in enumerate(rows):
                found[k] -= penalty.coefficient * self.overlength(len(self.samples["tokens"][i]), penalty.buffer_tokens)
        return found

    def overlength(self, length: int, buffer: int) -> float:
        """How far into the last ``buffer`` tokens a response has run: 0 ... 1."""
        return max(0.0, (length - (self.config.data.max_response_tokens - buffer)) / buffer)

    def agreement(self, i: int) -> float:
        """TTRL's vote or EMPO's frequency for row i."""
        group = self.samples["group"]
        answers = [self.answer(j) for j in range(len(group)) if group[j] == group[i]]
        own = self.answer(i)
        if own is None:
            return 0.0
        counts = {a: answers.count(a) for a in answers if a is not None}
        if self.config.stage == "ttrl":
            winners = [a for a, c in counts.items() if c == max(counts.values())]
            return float(winners == [own])
        chances = [c / len(answers) for c in counts.values()] + [1 / len(answers)] * answers.count(None)
        entropy = -sum(p * math.log(p) for p in chances)
        return counts[own] / len(answers) if entropy < math.log(len(answers)) - 1e-9 else 0.0

    def advantages(self, rows: list[int], rewards: list[float], values: Rows) -> Rows:
        mstep = self.config.algorithm.mstep
        lengths = [len(self.samples["tokens"][i]) for i in rows]
        if mstep.estimator == "group" or self.critic is None:
            found = []
            for k, i in enumerate(rows):
                peers = torch.tensor(
                    [
                        r
                        for r, j in zip(rewards, rows, strict=True)
                        if self.samples["group"][j] == self.samples["group"][i]
                    ]
                )
                a = rewards[k] - float(peers.mean())
                if mstep.advantage == "whiten":
                    a /= float(peers.std()) + 1e-6
                found.append(torch.full((lengths[k],), a))
            return found
        raw = [rewards[k] - values[i][: lengths[k]] for k, i in enumerate(rows)]
        everything = torch.cat(raw)
        if mstep.advantage == "whiten":
            return [(a - everything.mean()) / torch.sqrt(everything.var() + 1e-8) for a in raw]
        if mstep.advantage == "scale":
            return [a / torch.sqrt((everything**2).mean() + 1e-8) for a in raw]
        return raw

    def policy_loss(self, new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        mstep = self.config.algorithm.mstep
        if mstep.loss == "gspo":
            s = ((new - old).mean()).exp().detach()
            ratio = s * (new - new.detach()).exp()
        else:
            ratio = (new - old).exp()
        low, high = 1 - mstep.clip_low, 1 + mstep.clip_high
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
        if mstep.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * mstep.dual_clip), loss)
        return loss

    def correction(self, old: Tensor, sampled: Tensor) -> Tensor:
        """Factor of each token's loss for a sampler with other probabilities."""
        settings = self.config.algorithm.mstep.correction
        ratio = (old - sampled).exp()
        weight = {"none": torch.ones_like(ratio), "token": ratio, "sequence": ratio.prod().expand_as(ratio)}
        judged = {"none": torch.ones_like(ratio), "token": ratio, "sequence": ratio.log().mean().exp()}
        fine = (judged[settings.mask_level] >= settings.mask_low) & (judged[settings.mask_level] <= settings.mask_high)
        return torch.minimum(weight[settings.weights], torch.tensor(settings.cap)) * fine
