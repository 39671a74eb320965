"""The protocol with every exact saving taken: the same answers as `plain`, for a fraction.

A question has two rows of one KV cache. The picture is prefilled once and branches into both: on the one
the model answers from the whole picture (macro), on the other it names a region (locate), and they decode
together. The micro prompt goes on from the box, with the macro answer behind it as its draft; both
candidates branch from there to be scored. What a row holds of any prompt is never computed again, by
whichever way it came there: that is `sequence`. Several questions at once are more rows of the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import get_args

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Array
from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.geometry import Crop, Region, find_region
from dualfocus.runtime.image import Picture, whole
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.pool import EncodedImage, ImagePool, image_name
from dualfocus.runtime.reply import Reply
from dualfocus.runtime.result import (
    Answer,
    Counters,
    Event,
    FocusResult,
    Generation,
    Mode,
    ReplyName,
    ReplyToken,
    Stage,
    StageClock,
)
from dualfocus.runtime.selection import Candidate, candidates
from dualfocus.runtime.sequence import CachedSequence, Extension, common_prefix, extend
from dualfocus.runtime.turns import ImageToken, Prompt, Question, Turns, micro_answer


@dataclass(frozen=True)
class Savings:
    """Which of the exact savings are taken. None changes an answer; tests and benchmarks leave some out."""

    images: bool = True  # an image is encoded once for a question, not for every prompt that shows it
    prefix: bool = True  # a prompt starts from what a row holds of it
    batch: bool = True  # rows decode together
    forced: bool = True  # what the box grammar leaves no choice about is not decoded
    draft: bool = True  # the macro answer is the micro answer's draft
    select: bool = True  # candidates are scored as one batch, and not where their scores are known
    pool: bool = True  # pictures, crops and rows outlive the question


ALL = Savings()


@dataclass
class _Asked:
    """A question on its way."""

    picture: Picture
    turns: Turns
    mode: Mode
    box_reply: str | None = None
    whole: str = ""  # the picture's name; empty until it was hashed
    crop: str = ""  # the crop's name; empty until there is one
    reading: Prompt = field(init=False)  # the micro prompt, as soon as there is a crop
    crops: dict[str, Crop] = field(default_factory=dict)  # where in the picture both images are
    counters: Counters = field(default_factory=Counters)
    replies: dict[ReplyName, Reply] = field(default_factory=dict)
    region: Region = field(default_factory=Region)
    losses: tuple[float | None, float | None] = None, None  # of the macro and the micro answer
    skipped: bool = False
    looked: bool = False  # the region was looked for
    focus: CachedSequence = field(init=False)  # its rows: for locate, micro and a candidate,
    other: CachedSequence = field(init=False)  # and for macro and the other candidate

    def said(self, name: ReplyName) -> Generation | None:
        """A finished reply, if there was one."""
        return self.replies[name].generation if name in self.replies else None

    @property
    def answers(self) -> tuple[Answer | None, Answer | None]:
        """The macro and the micro answer."""
        macro, micro, question = self.said("macro"), self.said("micro"), self.turns.question
        return (
            Answer.of(macro, question, loss=self.losses[0]) if macro else None,
            Answer.of(micro, question, micro_answer, self.losses[1]) if micro else None,
        )

    @property
    def candidates(self) -> tuple[str, str] | None:
        """The texts to be scored for both, if they are."""
        return candidates(*self.answers, self.turns.question.options)

    def conclude(self, times_ms: dict[str, float]) -> FocusResult:
        """The finished question's result."""
        macro, micro = self.answers
        located = self.said("locate")
        return FocusResult.conclude(
            macro, located, self.region, micro, self.counters, times_ms, skipped=self.skipped
        )


@dataclass(frozen=True)
class _Views:
    """Images as the tower sees them: (N, 3, S, S) `pixels`, and by their names the questions they are for."""

    pixels: Array
    asked: dict[str, _Asked]


class FocusRunner:
    """Answers questions about pictures, and keeps what it saw of them for later questions.

    Its rows are shared by all its questions, so that each thread needs a runner of its own. On a GPU one
    thread of a process does all the work: what it records for replay is the thread's, and nobody else may
    use the GPU meanwhile.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        select: SelectRule | None = None,
        free_box: bool = False,
        skip_above: float | None = None,
        cache_mb: int = 512,
        batch: int = 1,
        savings: Savings = ALL,
    ) -> None:
        """`select` None takes the manifest's rule; `free_box` decodes the box reply without a grammar.

        `skip_above`, unlike everything else, changes answers: a macro answer whose `confidence` is above
        it stands, and no region is looked at.

        Memory: `batch` questions at once reserve ``2 x batch x context`` tokens of KV cache, each of
        ``2 x layers x kv_heads x head_size x 4`` bytes, touched as they are used (in float16, as on a GPU,
        half of that; and there all at once); images and prefixes kept for later questions hold at most
        `cache_mb` million bytes; the logits at hand, while it is asked something, at most
        ``2 x batch x (max_new_tokens + 1) x vocabulary x 4``.
        """
        assert batch >= 1, f"batch is {batch}"
        assert cache_mb >= 0, f"cache_mb is {cache_mb}"
        bundle.device.use()
        spec = bundle.manifest.decoder
        self._bundle = bundle
        self._select = select or bundle.manifest.select
        self._skip_above = skip_above
        self._savings = savings
        self._batch = batch
        self._grammar = None if free_box else bundle.grammar
        self._cache = KVCache(spec, 2 * batch, spec.context, bundle.device.memory)
        self._reset_rows()
        self._pool = ImagePool(cache_mb * 1_000_000 if savings.pool else 0)
        self._features: dict[str, Array] = {}  # by name, (T, D) each: the images of what is being asked
        self._waves = 0  # how often something was asked
        # a GPU encodes a crop while it still decodes; a processor's cores are all at work
        self._runs_ahead = savings.images and bundle.device.kind != "cpu"
        self._worker = ThreadPoolExecutor(1)
        self._ahead: dict[str, tuple[_Asked, Future[Array]]] = {}  # by name: crops that are being encoded

    def ask(
        self, picture: Picture, question: str | Question, mode: Mode = "dual", *, box_reply: str | None = None
    ) -> FocusResult:
        """Answer `question` about `picture`, (H, W, 3) uint8 RGB, upright.

        "dual" runs both passes and takes the better answer; "macro" looks at the whole picture only;
        "micro" takes the zoomed answer, and the macro answer where the model points nowhere.
        `box_reply` is used in place of the model's reply to step 2, which then is not asked for.
        Raises QuestionError for a question that is empty or too long, before anything is computed.
        """
        *_, result = self._stream(_Asked(picture, self._turns(question, mode), mode, box_reply))
        assert isinstance(result, FocusResult)
        return result

    def stream(self, picture: Picture, question: str | Question, mode: Mode = "dual") -> Iterator[Event]:
        """What `ask` does, as it happens: stages, the replies' tokens, the region, at last the result.

        The picture is copied. Times include what the reader of the stream does between events.
        """
        return self.session(picture).stream(question, mode)

    def ask_many(
        self, asked: Sequence[tuple[Picture, str | Question]], mode: Mode = "dual"
    ) -> list[FocusResult]:
        """Answer several (picture, question) pairs, up to `batch` at once: `ask`'s answers, in order.

        Pictures and crops are encoded together and replies decoded together. A result's times are those
        of all that were answered with it.
        """
        todo = [_Asked(picture, self._turns(question, mode), mode) for picture, question in asked]
        waves = [todo[start : start + self._batch] for start in range(0, len(todo), self._batch)]
        events = (event for wave in waves for event in self._run(wave))
        return [event for event in events if isinstance(event, FocusResult)]

    def session(self, picture: Picture) -> Session:
        """For several questions about `picture`: it is copied, and hashed only once."""
        kept = picture.copy()
        kept.flags.writeable = False
        return Session(self, kept, image_name(kept, self._bundle.digest))

    def _turns(self, question: str | Question, mode: Mode) -> Turns:
        assert mode in get_args(Mode), f"mode is {mode!r}"
        turns = Turns(self._bundle.manifest, self._bundle.tokenizer, question)
        turns.check_length(macro_only=mode == "macro")
        return turns

    def _stream(self, asked: _Asked) -> Iterator[Event]:
        for event in self._run([asked]):
            wave = self._waves
            yield event
            if self._waves != wave:
                raise RuntimeError(
                    "the runner was asked something else before this stream was read to its end"
                )

    def _run(self, wave: Sequence[_Asked]) -> Iterator[Event]:
        """Answer the questions of `wave`, at most `batch`, side by side."""
        self._waves += 1
        self._bundle.device.use()
        try:
            yield from self._answer(wave)
        except GeneratorExit:  # a stream that was left, at an event, where everything is in order
            raise
        except BaseException:  # anything else, Ctrl-C for one, can leave a row between two states
            self._reset_rows()
            raise

    def _reset_rows(self) -> None:
        rows = len(self._cache.lengths)
        self._cache.lengths = [0] * rows
        self._rows = [CachedSequence(self._cache, row) for row in range(rows)]

    def _answer(self, wave: Sequence[_Asked]) -> Iterator[Event]:
        clock = StageClock()

        def enter(stage: str) -> Stage:
            clock.enter(stage)
            return Stage(stage)

        yield enter("hash")
        self._open(wave)
        yield enter("view_whole")
        seen = self._view([(a, a.whole) for a in wave]) if self._savings.images else None
        yield enter("encode_whole")
        self._encode(seen)
        # behind a gate, a region is looked for once the macro answer turned out to be unsure
        gated = self._skip_above is not None
        rounds: list[tuple[ReplyName, ...]] = [("macro",), ("locate",)] if gated else [("macro", "locate")]
        for names in rounds:
            yield enter("prefill")
            for a in wave:
                if "macro" in names and a.mode != "micro":
                    yield from self._begin(a, "macro", a.turns.macro(a.whole))
                if "locate" in names and a.mode != "macro" and not a.skipped and a.box_reply is None:
                    yield from self._begin(a, "locate", a.turns.locate(a.whole))
            yield enter("decode")
            yield from self._decode(wave, ahead=self._runs_ahead and not gated)
            if gated:
                for a in wave:
                    a.skipped = a.mode == "dual" and self._is_sure(a)
        if curious := [a for a in wave if a.mode != "macro" and not a.skipped]:
            yield enter("view_crop")
            for a in curious:
                if not a.looked:
                    yield self._find_region(a)
        if zoomed := [a for a in wave if a.crop]:
            seen = self._view([(a, a.crop) for a in zoomed]) if self._savings.images else None
            yield enter("encode_crop")
            self._await_ahead()
            self._encode(seen)
            yield enter("micro_prefill")
            for a in zoomed:
                yield from self._begin(a, "micro", a.reading)
            yield enter("micro_decode")
            yield from self._decode(zoomed)
        if blind := [a for a in wave if a.mode == "micro" and not a.crop]:
            yield enter("macro")
            for a in blind:
                yield from self._begin(a, "macro", a.turns.macro(a.whole))
            yield from self._decode(blind)
        if undecided := [a for a in wave if a.candidates]:
            yield enter("select")
            self._score(undecided)
        times = clock.stop()
        yield from (a.conclude(times) for a in wave)

    def _open(self, wave: Sequence[_Asked]) -> None:
        """Name the pictures and give every question its rows."""
        names: dict[int, str] = {}  # by the array's identity, so that each is hashed once
        for a, focus, other in zip(wave, self._rows, self._rows[len(wave) :], strict=False):
            a.whole = a.whole or names.get(id(a.picture)) or image_name(a.picture, self._bundle.digest)
            names[id(a.picture)] = a.whole
            a.crops[a.whole] = whole(a.picture)
            a.focus, a.other = focus, other
        self._features.clear()
        self._ahead.clear()
        for sequence in self._rows:
            if not self._savings.pool:
                sequence.cut(0)
            sequence.forget_branches()

    def _view(self, wanted: Sequence[tuple[_Asked, str]]) -> _Views | None:
        """What the tower has to see of the images named: unless their tokens are kept or coming."""
        new: dict[str, _Asked] = {}
        for a, name in wanted:
            kept = self._pool.get(name) if self._savings.images else None
            if kept is not None:
                self._features[name] = kept.features
            elif name not in self._features and name not in self._ahead:
                new.setdefault(name, a)
        if not new:
            return None
        return _Views(self._bundle.view([(a.picture, a.crops[name]) for name, a in new.items()]), new)

    def _encode(self, seen: _Views | None) -> None:
        """Put the tokens of what is seen into `_features`, all of it encoded at once."""
        if seen is not None:
            encoded = self._bundle.vision.encode(seen.pixels)
            for (name, a), features in zip(seen.asked.items(), encoded, strict=True):
                # a copy, for a view would keep the batch alive
                self._encoded(a, name, features.copy())

    def _encoded(self, a: _Asked, name: str, features: Array) -> None:
        self._features[name] = features
        self._pool.put(name, EncodedImage(features))
        a.counters.vision_encodes += 1

    def _look_ahead(self, wave: Sequence[_Asked]) -> Iterator[Region]:
        """Begin to encode the crops of questions whose box is there, while their macro answers are not."""
        for a in wave:
            located, macro = a.replies.get("locate"), a.replies.get("macro")
            if a.looked or not (located and located.done) or not macro or macro.done:
                continue
            yield self._find_region(a)
            if a.crop and a.crop not in self._ahead and self._pool.get(a.crop) is None:
                self._ahead[a.crop] = a, self._worker.submit(self._encode_apart, a.picture, a.crops[a.crop])

    def _encode_apart(self, picture: Picture, crop: Crop) -> Array:
        """(T, D), computed by another thread."""
        with self._bundle.alone:
            self._bundle.device.use()
            return self._bundle.vision.encode(self._bundle.view([(picture, crop)]))[0]

    def _await_ahead(self) -> None:
        while self._ahead:
            name, (a, coming) = self._ahead.popitem()
            self._encoded(a, name, coming.result())

    def _begin(self, a: _Asked, name: ReplyName, prompt: Prompt) -> Iterator[ReplyToken]:
        """Prefill a reply's prompt, and what is expected of the reply; choose its first tokens."""
        row = a.other if name == "macro" else a.focus
        self._prepare(a, row, prompt)
        grammar = self._grammar if name == "locate" else None
        expected = a.said("macro") if name == "micro" and self._savings.draft else None
        a.replies[name] = reply = Reply(
            name,
            self._bundle,
            row,
            prompt,
            a.counters,
            cursor=grammar.start() if grammar else None,
            forced=self._savings.forced,
        )
        self._compute([reply.begin(expected.tokens if expected else ())])
        row.forget_logits(len(prompt.tokens) - 1)
        self._keep_prefix(a, row)
        yield from reply.choose()

    def _prepare(self, a: _Asked, row: CachedSequence, prompt: Prompt) -> None:
        """Make `row` hold as much of `prompt` as is held anywhere."""
        if not self._savings.images:
            names = dict.fromkeys(token.image for token in prompt.tokens if isinstance(token, ImageToken))
            for name in names:
                self._features.pop(name, None)
            self._encode(self._view([(a, name) for name in names]))
        if not self._savings.prefix:
            row.cut(0)
            return
        held = {s.row: common_prefix(s.tokens, prompt.tokens) for s in self._rows}
        best = max(self._rows, key=lambda s: (held[s.row], s is row))
        image = self._pool.get(a.whole)
        prefix = image.prefix if image else None
        if prefix is not None and common_prefix(prefix.tokens, prompt.tokens) > held[best.row]:
            row.load(prefix)
        elif best is not row:
            row.fork_from(best, held[best.row])

    def _keep_prefix(self, a: _Asked, row: CachedSequence) -> None:
        """Keep what every question about the picture begins with, for when no row holds it any more."""
        image = self._pool.get(a.whole)
        if image is None or image.prefix is not None or not self._savings.prefix:
            return
        length = row.tokens.index(ImageToken(a.whole, self._bundle.manifest.image.tokens - 1)) + 1
        if image.nbytes + length * self._cache.token_nbytes <= self._pool.limit:
            self._pool.put(a.whole, EncodedImage(image.features, row.save(length)))

    def _compute(self, extensions: Sequence[Extension]) -> None:
        """Run the decoder over what is new: over all rows at once, or over one after the other."""
        new = [extension for extension in extensions if extension.tokens]
        calls = [new] if self._savings.batch else [[extension] for extension in new]
        for call in filter(None, calls):
            extend(self._bundle.decoder, self._cache, self._bundle.embeddings, self._features, call)

    def _decode(self, wave: Sequence[_Asked], *, ahead: bool = False) -> Iterator[ReplyToken | Region]:
        """Go on with all unfinished replies of `wave` until there are none; `ahead`: see `_look_ahead`."""
        while live := [reply for a in wave for reply in a.replies.values() if not reply.done]:
            together = live if self._savings.batch else live[:1]
            self._compute([reply.go_on() for reply in together])
            for a in wave:
                rows = sum(reply in together for reply in a.replies.values())
                a.counters.decode_rows += rows
                a.counters.decode_steps += rows > 0
            for reply in together:
                yield from reply.choose()
            if ahead:
                yield from self._look_ahead(wave)

    def _is_sure(self, a: _Asked) -> bool:
        macro = a.said("macro")
        return macro is not None and self._skip_above is not None and macro.confidence > self._skip_above

    def _find_region(self, a: _Asked) -> Region:
        """Where to zoom in."""
        a.looked = True
        if (located := a.said("locate")) is not None:
            a.box_reply = located.text
        assert a.box_reply is not None
        manifest = self._bundle.manifest
        height, width = a.picture.shape[:2]
        a.region = find_region(a.box_reply, manifest.coordinates, width, height, manifest.image)
        if (crop := a.region.crop) is not None:
            name = f"{a.whole} {crop}"
            try:
                a.reading = a.turns.micro(a.whole, name, a.box_reply)
            except QuestionError as error:  # in the history, a reply can take more tokens than it was said in
                a.region = Region(a.region.box, None, str(error))
            else:
                a.crop, a.crops[name] = name, crop
        return a.region

    def _score(self, wave: Sequence[_Asked]) -> None:
        """The losses of both candidates of every question.

        Candidates part at their first different token. Up to there one row computes for both; from there
        on each has a row of its own, in one call for all of them.
        """
        pairs: list[tuple[_Asked, list[Candidate]]] = []
        parted: list[Extension] = []
        for a in wave:
            box, texts, recall = a.box_reply, a.candidates, self._savings.select
            assert box is not None
            assert texts is not None
            try:
                prompts = [a.turns.select(a.whole, a.crop, box, text) for text in texts]
            except QuestionError:  # no room to score what was said: the macro answer stands
                continue
            pair = [Candidate(prompt, a.focus, recall=recall) for prompt in prompts]
            pairs.append((a, pair))
            todo = [candidate for candidate in pair if candidate.unknown]
            extensions: list[Extension] = []
            if len(todo) == 2 and self._savings.select:
                self._prepare(a, a.focus, prompts[0])
                shared = common_prefix(*(prompt.tokens for prompt in prompts))
                extensions.append(pair[0].up_to(shared))
                self._compute(extensions)
                a.other.fork_from(a.focus, shared)
                pair[1].row = a.other
                for candidate in pair:
                    candidate.look()
                    extensions.append(candidate.up_to(len(candidate.prompt.tokens) - 1))
                parted += extensions[1:]
            else:
                for candidate in todo:
                    self._prepare(a, a.focus, candidate.prompt)
                    extensions.append(candidate.up_to(len(candidate.prompt.tokens) - 1))
                    self._compute(extensions[-1:])
                    candidate.look()  # before the row goes on to the other one
            computed = sum(len(extension.tokens) for extension in extensions)
            a.counters.tokens_prefilled += computed
            a.counters.tokens_reused += sum(len(prompt.tokens) for prompt in prompts) - computed
        self._compute(parted)
        for a, (macro, micro) in pairs:
            macro.look()
            micro.look()
            a.losses = macro.loss(self._select), micro.loss(self._select)


class Session:
    """Questions about one picture. Made by `FocusRunner.session`."""

    def __init__(self, runner: FocusRunner, picture: Picture, name: str) -> None:
        self._runner = runner
        self._picture = picture
        self._name = name

    def ask(self, question: str | Question, mode: Mode = "dual") -> FocusResult:
        """As `FocusRunner.ask`."""
        *_, result = self.stream(question, mode)
        assert isinstance(result, FocusResult)
        return result

    def stream(self, question: str | Question, mode: Mode = "dual") -> Iterator[Event]:
        """As `FocusRunner.stream`."""
        turns = self._runner._turns(question, mode)
        return self._runner._stream(_Asked(self._picture, turns, mode, whole=self._name))
