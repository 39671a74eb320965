"""What "the same answer" means, between a fast runner and the plain one on the same bundle.

Replies token for token, boxes, crops and choices equal; losses and log-probabilities within 1e-4. Sums over
rows and chunks of other sizes round otherwise, so where the plain runner's token led the fast one's by less
than 1e-3 either may come: such a first divergence is counted, and nothing that depends on it is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.grammar import BoxGrammar
from dualfocus.runtime.image import Picture, view, whole
from dualfocus.runtime.result import Answer, FocusResult, Generation, ReplyName
from dualfocus.runtime.sequence import embed
from dualfocus.runtime.turns import Prompt, Question, Turns

TOLERANCE = 1e-4  # of losses and log-probabilities
TIE = 1e-3  # logits of the plain runner closer than this may swap


@dataclass(frozen=True)
class Pair:
    """A question about a picture; `box_reply` stands for what the model would say to the locate turn."""

    picture: Picture
    question: str | Question
    box_reply: str | None = None


@dataclass
class Tally:
    """What was compared with the plain runner on `bundle`. `ties` describes each divergence let pass."""

    bundle: Bundle
    pairs: int = 0
    tokens: int = 0
    losses: int = 0
    ill_formed: int = 0  # pairs whose plain box no grammar gives, which are not compared
    chosen: dict[str, int] = field(default_factory=lambda: {"macro": 0, "micro": 0})
    ties: list[str] = field(default_factory=list)

    @cached_property
    def _grammar(self) -> BoxGrammar | None:
        return BoxGrammar.build(self.bundle.manifest, self.bundle.tokenizer)

    def compare(self, pair: Pair, fast: FocusResult, plain: FocusResult, *, alike: bool = False) -> None:
        """Assert that `fast` is `plain`; `alike` says that both hold boxes to a grammar, or none."""
        self.pairs += 1
        if plain.located and not alike and not self._is_well_formed(plain.located.tokens):
            self.ill_formed += 1
            return
        same_macro = self._same_answer(pair, "macro", fast, plain)
        if not self._same_reply(pair, "locate", fast.located, plain.located, plain):
            return
        assert (fast.box, fast.crop, fast.fallback) == (plain.box, plain.crop, plain.fallback)
        same_micro = self._same_answer(pair, "micro", fast, plain)
        if not (same_macro and same_micro):
            return
        for ours, theirs in ((fast.macro, plain.macro), (fast.micro, plain.micro)):
            self._same_loss(ours, theirs)
        if fast.chosen != plain.chosen:
            assert plain.macro
            assert plain.micro
            apart = abs((plain.macro.loss or 0) - (plain.micro.loss or 0))
            assert apart < 2 * TOLERANCE, f"{pair.question!r}: chose {fast.chosen}, expected {plain.chosen}"
            self.ties.append(f"{pair.question!r}: choice, losses {apart:.1e} apart")
            return
        assert fast.answer == plain.answer
        self.chosen[fast.chosen] += 1

    def _is_well_formed(self, tokens: Sequence[int]) -> bool:
        """A box in its canonical spelling."""
        if self._grammar is None:
            return True
        cursor = self._grammar.start()
        for token in tokens:
            if token not in cursor.allowed:
                return False
            cursor.advance(token)
        return cursor.done

    def _same_answer(self, pair: Pair, name: ReplyName, fast: FocusResult, plain: FocusResult) -> bool:
        ours, theirs = (getattr(result, name) for result in (fast, plain))
        assert (ours is None) == (theirs is None), f"{pair.question!r}, {name}: {ours} is not {theirs}"
        if ours is None:
            return True
        same = self._same_reply(pair, name, ours.generation, theirs.generation, plain)
        assert not same or ours.text == theirs.text
        return same

    def _same_reply(
        self,
        pair: Pair,
        name: ReplyName,
        ours: Generation | None,
        theirs: Generation | None,
        plain: FocusResult,
    ) -> bool:
        """False after a divergence that a near-tie explains."""
        assert (ours is None) == (theirs is None), f"{pair.question!r}, {name}: {ours} is not {theirs}"
        if ours is None or theirs is None:
            return True
        for i, (token, expected) in enumerate(zip(ours.tokens, theirs.tokens, strict=False)):
            if token != expected:
                lead = self._lead(pair, name, plain, theirs.tokens[:i], expected, token)
                what = f"{pair.question!r}, {name}: token {i} is {token}, {expected} leads it by {lead:.1e}"
                assert lead < TIE, what
                self.ties.append(what)
                return False
            logprob = ours.logprobs[i]
            if logprob is not None:
                assert abs(logprob - theirs.logprobs[i]) < TOLERANCE, f"{pair.question!r}, {name}: token {i}"
            assert name == "locate" or logprob is not None  # only a box's forced tokens are not looked at
            self.tokens += 1
        assert (ours.tokens, ours.text) == (theirs.tokens, theirs.text)
        return True

    def _same_loss(self, ours: Answer | None, theirs: Answer | None) -> None:
        if ours is None or theirs is None:
            return
        assert (ours.loss is None) == (theirs.loss is None)
        if ours.loss is not None and theirs.loss is not None:
            assert abs(ours.loss - theirs.loss) < TOLERANCE, (
                f"{ours.text!r}: {ours.loss} is not {theirs.loss}"
            )
            self.losses += 1

    def _lead(
        self,
        pair: Pair,
        name: ReplyName,
        plain: FocusResult,
        said: Sequence[int],
        expected: int,
        token: int,
    ) -> float:
        """By how much the logit of `expected` leads that of `token` behind what was `said`, computed anew.

        At least the best logit's lead over the second, of the tokens that were to be had.
        """
        turns = Turns(self.bundle.manifest, self.bundle.tokenizer, pair.question)
        box_reply = pair.box_reply or (plain.located.text if plain.located else "")
        crops = {"whole": whole(pair.picture)}
        if name == "macro":
            prompt = turns.macro("whole")
        elif name == "locate":
            prompt = turns.locate("whole")
        else:
            assert plain.crop
            prompt = turns.micro("whole", "crop", box_reply)
            crops["crop"] = plain.crop
        features = {
            image: self.bundle.vision.encode(view(pair.picture, crop, self.bundle.manifest.image))[0]
            for image, crop in crops.items()
        }
        logits = last_logits(self.bundle, Prompt((*prompt.tokens, *said), ()), features)
        return float(logits[expected] - logits[token])

    def __str__(self) -> str:
        lines = [
            f"{self.pairs} pairs, {self.ill_formed} of them with an ill-formed box, {self.tokens} tokens, "
            f"{self.losses} losses, chosen {self.chosen}, {len(self.ties)} near-ties"
        ]
        return "\n  ".join(lines + self.ties)


def last_logits(bundle: Bundle, prompt: Prompt, features: dict[str, np.ndarray]) -> np.ndarray:
    """(vocabulary,) logits of what follows `prompt`, from an empty cache."""
    cache = KVCache(bundle.manifest.decoder, rows=1, capacity=bundle.manifest.decoder.context)
    embeddings = embed(prompt.tokens, bundle.embeddings, features)
    ((logits,),) = bundle.decoder.extend(cache, [0], [embeddings], [[len(prompt.tokens) - 1]])
    return logits


def same(pair: Pair, fast: FocusResult, plain: FocusResult, bundle: Bundle, *, alike: bool = False) -> None:
    """One comparison, without near-ties and ill-formed boxes."""
    tally = Tally(bundle)
    tally.compare(pair, fast, plain, alike=alike)
    assert not tally.ties
    assert not tally.ill_formed
