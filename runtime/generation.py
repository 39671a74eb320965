"""What a slot computes: a reply decoded greedily, or the log-probabilities of replies that are given.

Tokens may be computed before they are chosen: a draft, or what a grammar leaves no or hardly any choice
about (jump-forward). `Reply.choose` then goes through their logits. As far as greedy choice agrees
they are the reply; where it departs the sequence is cut. A draft changes what is computed, never the reply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenizers import Tokenizer

from dualfocus.runtime.engines import Logits
from dualfocus.runtime.errors import ModelError
from dualfocus.runtime.manifest import Manifest
from dualfocus.runtime.result import Counters, Generation, ReplyToken
from dualfocus.runtime.sequence import CachedSequence, Extension, LogProb, likeliest, log_softmax
from dualfocus.runtime.work import Generate, Score


def check_finite(logprob: LogProb) -> float:
    """A log-probability that was computed. Raises ModelError if it is no finite number."""
    assert logprob is not None
    if not math.isfinite(logprob):
        raise ModelError(
            "the model computed a number that is not finite: its weights are damaged, or too large for its "
            "precision; export it again with --precision fp32 --cache float32"
        )
    return logprob


class Reply:
    """A reply on its way: `start` in a slot, then `choose` and `advance` in turn until it is `done`."""

    sequence: CachedSequence

    def __init__(self, work: Generate, manifest: Manifest, tokenizer: Tokenizer, counters: Counters) -> None:
        assert len(work.prompt.tokens) <= manifest.decoder.context, "the prompt is longer than the context"
        self._name = work.reply
        self._prompt = work.prompt
        self._draft = work.draft
        self._cursor = work.grammar.start() if work.grammar else None
        self._tokenizer = tokenizer
        self._eos = manifest.tokens.eos
        self._context = manifest.decoder.context
        self._most = min(manifest.max_new_tokens, self._context - len(work.prompt.tokens) + 1)
        self._counters = counters
        self._tokens: list[int] = []
        self._logprobs: list[LogProb] = []
        self._shown = ""  # the text that was given out

    @property
    def done(self) -> bool:
        """The reply has ended, or is as long as it may be."""
        return len(self._tokens) == self._most or (bool(self._tokens) and self._tokens[-1] in self._eos)

    @property
    def result(self) -> Generation:
        """The finished reply."""
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True).strip()
        return Generation(text, tuple(self._tokens), tuple(self._logprobs))

    def start(self, sequence: CachedSequence) -> Extension:
        """Prefill the prompt plus the draft; also request logits for unscored replies in the history."""
        self.sequence = sequence
        prompt, end = self._prompt, len(self._prompt.tokens)
        ahead = (self._ahead() or self._draft)[: self._context - end]
        scored = [at for reply in prompt.replies for at in reply]
        known = sequence.recall(prompt.tokens, scored)
        unknown = [at - 1 for at, logprob in zip(scored, known, strict=True) if logprob is None]
        after = [*unknown, *range(end - 1, end + len(ahead))]
        extension = Extension.to(sequence, (*prompt.tokens, *ahead), after)
        kept = min(len(sequence.tokens), end)
        self._counters.tokens_reused += kept
        self._counters.tokens_prefilled += end - kept
        return extension

    def advance(self) -> Extension:
        """Feed the token chosen last, and what is ahead of it."""
        start = len(self.sequence.tokens)
        new = [self._tokens[-1], *self._ahead()][: self._context - start]
        return Extension(self.sequence, new, range(start, start + len(new)))

    def choose(self) -> list[ReplyToken]:
        """Choose tokens as far as logits reach, at least one."""
        if not self._tokens:
            self.sequence.forget_logits(len(self._prompt.tokens) - 1)
        chosen: list[ReplyToken] = []
        while not self.done:
            at = len(self._prompt.tokens) + len(self._tokens)
            logits = self.sequence.logits(at - 1)
            if logits is not None:
                token = self._greedy(logits)
                self._verify(at, token)
                chosen.append(self._take(token, check_finite(log_softmax(logits, token))))
            elif (rest := self._ahead()) and rest[-1] in self._eos:  # no choice is left: nothing to compute
                chosen += [self._take(token, None) for token in rest]
            else:
                break
        return chosen

    def _ahead(self) -> list[int]:
        """Tokens that the grammar expects next."""
        return self._cursor.ahead()[: self._most - len(self._tokens)] if self._cursor else []

    def _greedy(self, logits: Logits) -> int:
        return likeliest(logits, self._cursor.allowed if self._cursor else None)

    def _verify(self, at: int, token: int) -> None:
        """Cut the sequence where what it holds ahead of the choice is not what was chosen."""
        ahead = self.sequence.tokens[at:]
        if not ahead or (self._cursor and self._cursor.forced):
            return
        accepted = ahead[0] == token
        self._counters.tokens_accepted += accepted
        self._counters.tokens_drafted += 1 if accepted else len(ahead)
        if not accepted:
            self.sequence.cut(at)

    def _take(self, token: int, logprob: LogProb) -> ReplyToken:
        if self._cursor:
            self._counters.tokens_forced += self._cursor.forced
            self._cursor.advance(token)
        self._tokens.append(token)
        self._logprobs.append(logprob)
        # a character may take several tokens, and a later one can undo an earlier: then nothing is added
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        new = text[len(self._shown) :] if text.startswith(self._shown) else ""
        if new.endswith("\ufffd") and not self.done:
            new = ""
        self._shown += new
        return ReplyToken(self._name, token, new)


class Scoring:
    """Scores the replies of a prompt: `start` in a slot, then `complete`."""

    def __init__(self, work: Score, counters: Counters, known: Sequence[CachedSequence]) -> None:
        """Whatever one of the `known` sequences has computed of the prompt is not computed again."""
        self._prompt = work.prompt
        self._counters = counters
        self._counters.tokens_reused += len(work.prompt.tokens)
        self._scored = [at for reply in work.prompt.replies for at in reply]
        self._logprobs: list[LogProb] = [None] * len(self._scored)
        for sequence in known:
            self._recall(sequence)
        self.done = not self._unknown

    @property
    def result(self) -> tuple[list[float], list[float]]:
        """The log-probabilities of all replies but the last, and of the last."""
        logprobs = [check_finite(logprob) for logprob in self._logprobs]
        earlier = len(logprobs) - len(self._prompt.replies[-1])
        return logprobs[:earlier], logprobs[earlier:]

    def start(self, sequence: CachedSequence) -> Extension:
        """Prefill the prompt up to the last unknown token, with logits for all that is unknown."""
        self._recall(sequence)  # another prompt may have computed more since
        unknown = self._unknown
        if not unknown:
            return Extension(sequence, [], [])
        extension = Extension.to(sequence, self._prompt.tokens[: unknown[-1]], [at - 1 for at in unknown])
        self._counters.tokens_prefilled += len(extension.tokens)
        self._counters.tokens_reused -= len(extension.tokens)
        return extension

    def complete(self, sequence: CachedSequence) -> None:
        """All that was unknown is computed."""
        self._recall(sequence)
        self.done = True

    @property
    def _unknown(self) -> list[int]:
        pairs = zip(self._scored, self._logprobs, strict=True)
        return [at for at, logprob in pairs if logprob is None]

    def _recall(self, sequence: CachedSequence) -> None:
        found = sequence.recall(self._prompt.tokens, self._scored)
        pairs = zip(self._logprobs, found, strict=True)
        self._logprobs = [new if old is None else old for old, new in pairs]
