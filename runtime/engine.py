"""Continuous batching: requests join and leave at every step.

A request's life:

1. `prepare` names its picture and runs its protocol up to the first work. Any thread may do that.
2. `add` queues it. It becomes live when two slots are there for it: by priority, then in order of arrival.
3. A step encodes the images that live requests need, in one call of the tower.
4. It gives each new prompt a slot, with as much of it as any slot holds, and prefills the rest in chunks.
5. It decodes all live replies, in one call of the decoder.
6. A protocol is sent its results as soon as all are there. What it yields next joins the others.
7. When the protocol returns, fails or is cancelled, its slots are free, and stay the prefix cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Array
from dualfocus.runtime.generation import Reply, Scoring
from dualfocus.runtime.geometry import Crop
from dualfocus.runtime.image import Picture, whole
from dualfocus.runtime.prefix_cache import PrefixCache, image_name
from dualfocus.runtime.request import Job, Request
from dualfocus.runtime.result import Event, Stage, StageClock
from dualfocus.runtime.sequence import Extension, extend
from dualfocus.runtime.turns import Question, Turns
from dualfocus.runtime.work import Encode, Generate, Protocol, Score, Task, crop_name

CHUNK = 512  # tokens
PADDING = 4  # positions that a call may waste on prompts of other lengths; for more, another call costs less


class Piece(NamedTuple):
    """What a call of the decoder computes for a job, and what of its prompt is then left to prefill."""

    request: Request
    job: Job
    extension: Extension
    rest: Extension | None = None


class Engine:
    """Runs requests on one bundle. One thread calls it; `worker` is for many."""

    def __init__(self, bundle: Bundle, *, slots: int = 2, cache_mb: float = 512, chunk: int = CHUNK) -> None:
        """`slots` rows of KV cache: half as many requests are live at once.

        Memory: ``slots x context`` tokens of KV cache are reserved, each of ``2 x layers x kv_heads x
        head_size x 4`` bytes (in float16 half of that), and touched as they are used; on a GPU, all of it at
        once. Of that, and of images, at most `cache_mb` million bytes outlive their requests. Logits of live
        replies take up to ``(max_new_tokens + 1) x vocabulary x 4`` bytes each.

        Once a live request has begun to answer, a step prefills at most `chunk` tokens. Chunks end at
        multiples of `chunk` in a prompt, whatever else is live.
        """
        assert slots >= 1, f"slots is {slots}"
        assert chunk >= 1, f"chunk is {chunk}"
        bundle.device.use()
        spec = bundle.manifest.decoder
        self._bundle = bundle
        self._chunk = chunk
        self._cache = KVCache(spec, slots, spec.context, bundle.device.memory)
        self.prefixes = PrefixCache(self._cache, int(cache_mb * 1_000_000))
        self._most_live = max(1, slots // 2)
        self._queue: list[Request] = []
        self._live: list[Request] = []
        # a GPU encodes while it decodes; a processor's cores are all at work
        self._aside = None if bundle.device.kind == "cpu" else ThreadPoolExecutor(1)
        self._encoding: dict[str, Future[dict[str, Array | Exception]]] = {}  # by name
        self._stale = False  # something was interrupted: slots may be between two states
        self._stepping = False

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not self._queue and not self._live

    def prepare(
        self,
        picture: Picture,
        question: str | Question,
        protocol: Protocol,
        *,
        name: str | None = None,
        priority: int = 0,
        follow: Callable[[Event], object] = lambda _: None,
    ) -> Request:
        """A request to ask `question` about `picture`, (H, W, 3) uint8 RGB, which nobody may change.

        `name` is the picture's `image_name`, if it is known. `follow` is called with each event, by the
        thread that steps the engine. Raises QuestionError, and whatever else the protocol raises before its
        first work. Any thread may call this.
        """
        bundle, clock = self._bundle, StageClock()
        clock.enter("hash")
        follow(Stage("hash"))
        name = name or image_name(picture, bundle.digest)
        request = Request(picture, name, priority, clock, follow)
        turns = Turns(bundle.manifest, bundle.tokenizer, question)
        request.start(protocol(Task(bundle.manifest, turns, bundle.grammar, picture, name)))
        return request

    def add(self, request: Request) -> None:
        """Queue a request that was prepared; its protocol may have ended without any work."""
        if request.done:
            return
        request.enter("queue")
        self._queue.append(request)
        self._queue.sort(key=lambda queued: -queued.priority)  # stable: then in order of arrival

    def submit(
        self, picture: Picture, question: str | Question, protocol: Protocol, **options: Any
    ) -> Request:
        """`prepare` and `add`."""
        request = self.prepare(picture, question, protocol, **options)
        self.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request with CancelledError, in whatever stage it is; it may be done already."""
        with self._all_or_none():
            if request in self._queue:
                self._queue.remove(request)
            if not request.done:
                self._fail(request, CancelledError())

    def run(self, request: Request) -> Any:
        """Step until a request is done. Returns or raises its result."""
        while not request.done:
            assert not self.idle, "the request is another engine's"
            self.step()
        return request.result

    def step(self) -> None:
        """Encode, prefill and decode what live requests need next.

        What a request fails with is its own. What else is raised, as by Ctrl-C, ends all requests, and the
        engine holds nothing afterwards.
        """
        self._stepping = False  # also if the last one was interrupted as it ended
        with self._all_or_none():
            self._bundle.device.use()
            while self._queue and len(self._live) < self._most_live:
                self._live.append(self._queue.pop(0))
            worked = [self._encode(), self._prefill(), self._decode()]
            if self._encoding and not any(worked):
                wait(self._encoding.values(), return_when=FIRST_COMPLETED)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Run to the end, or end all requests and hold nothing; if that is interrupted too, the next time."""
        if self._stepping:  # a follower cancels a request
            yield
            return
        if self._stale:
            self._abandon(CancelledError())
        self._stepping = self._stale = True
        try:
            yield
        except BaseException as error:
            self._abandon(error)
            raise
        finally:
            self._stepping = False
        self._stale = False

    def _abandon(self, error: BaseException) -> None:
        self.prefixes.clear()
        self._encoding.clear()
        for request in [*self._queue, *self._live]:
            request.fail(error)
        self._queue, self._live = [], []
        self._stale = False

    def _jobs(self, *kinds: type) -> Iterator[tuple[Request, Job]]:
        """Jobs of live requests whose work is of `kinds`. What is yielded may end or fail meanwhile."""
        for request in list(self._live):
            for job in list(request.jobs):
                if isinstance(job.work, kinds) and not request.done:
                    yield request, job

    def _encode(self) -> bool:
        fresh: dict[str, Array | Exception] = {}
        for future in {future for future in self._encoding.values() if future.done()}:
            fresh |= future.result()
        for name in fresh:
            del self._encoding[name]
        new: dict[str, tuple[Request, Crop]] = {}
        for request, job in self._jobs(Encode):
            assert isinstance(job.work, Encode)
            name = crop_name(request.name, job.work.crop)
            if name not in fresh and name not in self._encoding and self.prefixes.image(name) is None:
                new.setdefault(name, (request, job.work.crop))
        if new and self._aside is not None:
            # of a request that decodes meanwhile, that is the stage
            self._enter_stage("encode", [of for of in new.values() if not of[0].jobs[1:]])
            self._encoding |= dict.fromkeys(new, self._aside.submit(self._encode_aside, new))
        elif new:
            fresh |= self._encode_images(new, partial(self._enter_stage, images=new.values()))
        for name, features in fresh.items():
            if not isinstance(features, Exception):
                self.prefixes.keep_image(name, features)
        for request, job in self._jobs(Encode):
            assert isinstance(job.work, Encode)
            name = crop_name(request.name, job.work.crop)
            features = fresh[name] if name in fresh else self.prefixes.image(name)
            if isinstance(features, Exception):
                self._fail(request, features)
            elif features is not None:
                request.features[name] = features
                self._finish(request, job, None)
        return bool(fresh)

    def _enter_stage(self, stage: str, images: Iterable[tuple[Request, Crop]]) -> None:
        for request, crop in images:
            with self._blame(request):
                request.enter(f"{stage}_{'whole' if crop == whole(request.picture) else 'crop'}")

    def _encode_aside(self, images: Mapping[str, tuple[Request, Crop]]) -> dict[str, Array | Exception]:
        try:
            with self._bundle.alone:
                self._bundle.device.use()
                return self._encode_images(images)
        except Exception as error:
            return dict.fromkeys(images, error)

    def _encode_images(
        self, images: Mapping[str, tuple[Request, Crop]], enter: Callable[[str], object] = lambda _: None
    ) -> dict[str, Array | Exception]:
        """The (T, D) tokens of images by name, encoded together; or, of each, why it cannot be encoded."""
        try:
            enter("view")
            pixels = self._bundle.view([(request.picture, crop) for request, crop in images.values()])
            enter("encode")
            encoded = self._bundle.vision.encode(pixels)
        except Exception as error:
            if len(images) == 1:
                return dict.fromkeys(images, error)
            alone = [self._encode_images({name: image}) for name, image in images.items()]
            return {name: features for found in alone for name, features in found.items()}
        for request, _ in images.values():
            request.counters.vision_encodes += 1
        # copies, for a view would keep the batch alive
        return {name: features.copy() for name, features in zip(images, encoded, strict=True)}

    def _prefill(self) -> bool:
        """Prefill all prompts that wait; or one chunk, if a request is answering already."""
        left: float = self._chunk if any(request.answering for request in self._live) else math.inf
        worked = False
        while pieces := self._next_pieces(left):
            for group in together([len(piece.extension.tokens) for piece in pieces], self._chunk):
                self._extend([pieces[at] for at in group])
            for piece in pieces:
                left -= len(piece.extension.tokens)
                if not piece.rest:
                    self._computed(piece.request, piece.job)
            worked = True
        return worked

    def _next_pieces(self, left: float) -> list[Piece]:
        """The next chunk of each prompt, `left` tokens at most; those first that came first."""
        pieces: list[Piece] = []
        for request, job in self._jobs(Generate, Score):
            if job.slot is None:
                self._place(request, job)
            if job.prompt is not None:
                start = len(job.prompt.sequence.tokens)
                extension, rest = job.prompt.split(self._chunk - start % self._chunk)
                if len(extension.tokens) <= left:
                    left -= len(extension.tokens)
                    pieces.append(Piece(request, job, extension, rest if rest.tokens else None))
        return pieces

    def _place(self, request: Request, job: Job) -> None:
        """Give a prompt a slot, if there is one for it; unless all that is to be scored is known."""
        work = job.work
        assert isinstance(work, Generate | Score)
        with self._blame(request):
            if isinstance(work, Score) and job.live is None:
                request.enter("select")
                if request.done:
                    return
                job.live = Scoring(work, request.counters, self.prefixes.slots)
                if job.live.done:
                    self._finish(request, job, job.live.result)
                    return
            coming = [other.prompt for _, other in self._jobs(Generate, Score) if other.prompt is not None]
            job.slot = self.prefixes.acquire(work.prompt.tokens, request, coming)
            if job.slot is None:
                return
            if isinstance(work, Generate):
                request.enter(f"{job.stage}prefill")
                job.live = Reply(work, self._bundle.manifest, self._bundle.tokenizer, request.counters)
            if request.done:  # its follower has cancelled it
                return
            assert job.live is not None
            prompt = job.live.start(job.slot)
            if prompt.tokens:
                job.prompt = prompt
            else:
                self._computed(request, job)

    def _decode(self) -> bool:
        """One step of every reply."""
        batch: list[Piece] = []
        for request, job in self._jobs(Generate):
            if isinstance(job.live, Reply) and job.prompt is None:
                with self._blame(request):
                    batch.append(Piece(request, job, job.live.advance()))
        requests = [piece.request for piece in batch]
        for request in dict.fromkeys(requests):
            request.counters.decode_steps += 1
            request.counters.decode_rows += requests.count(request)
            if all(job.prompt is None for job in request.jobs):
                with self._blame(request):
                    request.enter(f"{request.jobs[-1].stage}decode")
        self._extend(batch)
        for piece in batch:
            self._computed(piece.request, piece.job)
        return bool(batch)

    def _extend(self, batch: Sequence[Piece]) -> None:
        """One call of the decoder. If that fails, one for each: what fails by itself fails its request."""
        batch = [piece for piece in batch if not piece.request.done]
        if not batch:
            return
        features = {name: image for piece in batch for name, image in piece.request.features.items()}
        extensions = [piece.extension for piece in batch]
        try:
            extend(self._bundle.decoder, self._cache, self._bundle.embeddings, features, extensions)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0].request, error)
            else:
                for piece in batch:
                    self._extend([piece])
        else:
            for piece in batch:
                piece.job.prompt = piece.rest

    def _computed(self, request: Request, job: Job) -> None:
        """A job has the logits that it waited for."""
        live, slot = job.live, job.slot
        with self._blame(request):
            if isinstance(live, Reply) and not request.done:
                for token in live.choose():
                    if not request.done:
                        request.emit(token)
            elif isinstance(live, Scoring) and slot is not None:
                live.complete(slot)
            if not request.done and live is not None and live.done and slot is not None:
                result = live.result
                self.prefixes.release(slot)
                job.slot = None
                self._finish(request, job, result)

    def _finish(self, request: Request, job: Job, result: Any) -> None:
        with self._blame(request):
            request.finish(job, result)
        if request.done:
            self._leave(request)

    @contextmanager
    def _blame(self, request: Request) -> Iterator[None]:
        """What is raised here is the request's failure, not the engine's."""
        try:
            yield
        except Exception as error:
            self._fail(request, error)

    def _fail(self, request: Request, error: BaseException) -> None:
        slots = [job.slot for job in request.jobs if job.slot is not None]
        request.fail(error)
        for slot in slots:
            self.prefixes.release(slot)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        if request in self._live:
            self._live.remove(request)
            self.prefixes.end(request)


def together(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which prompts, by their lengths, share a call: it pads all to the longest.

    A call has `most` positions at most, or one prompt, and wastes up to `PADDING` of them.
    """
    groups: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups:
            group = [*groups[-1], at]
            positions = len(group) * lengths[group[0]]
            if positions <= most and positions - sum(lengths[i] for i in group) <= PADDING:
                groups[-1] = group
                continue
        groups.append([at])
    return groups
