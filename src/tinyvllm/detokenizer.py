"""Token ids to text while they arrive: what has been emitted never changes, and nothing is lost.

The promise: all that is emitted, joined, is `tokenizer.decode(all output ids)`, character for
character, cut at the first stop string that counts: as in vLLM, one that ends in text of the first
min_tokens tokens does not. A character is of the token that completes it. The prompt plays no part
in all this: a text begins as its own decode begins, so the space that SentencePiece models write
before the first word is dropped.

How: only the last few tokens (the window) are decoded, without and with the new ones; the
difference is what the new ones add. Held back is what later tokens can still change:

  a last U+FFFD         which may be the beginning of a character, of one to three bytes
  a run of byte tokens  such as <0xE4> <0xBD>: a byte that fits nowhere turns every byte of its
                        run into U+FFFD, so a run waits until it ends or cannot be UTF-8 any more
  the text's end        as far as it spells the beginning of a stop string

Why four tokens of context are enough: they have four bytes or more, and a UTF-8 decoder that starts
in the middle agrees with one that has read everything after three continuation bytes at most, or
at the first byte of another kind. Other decoders need to know only that the text has begun;
`_decoder_steps` in tokenizer.py admits no others.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tinyvllm.errors import InvalidRequestError
from tinyvllm.tokenizer import Tokenizer, byte_of

_CONTEXT = 4  # tokens with text that stay in the window
_MAX_WINDOW = 16  # a longer window is cut back, which costs one more decode


class IncrementalDetokenizer:
    """The text of one sequence: `push` its tokens as they come, `finish` once at the end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        if "" in stop:
            raise InvalidRequestError("a stop string is empty. Leave it out.")
        self.stop_reason: str | None = None  # the stop string that has ended the text
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop_str_in_output
        self._stops = [_StopString(text) for text in stop]
        self._num_early_tokens = min_tokens if stop else 0  # to come, in whose text no stop counts
        self._num_early_chars = 0  # of them, held back when the last of these tokens had come
        self._finished = False
        self._emitted: list[str] = []
        self._window: list[int] = []
        self._passed_on = 0  # characters of decode(window) that are certain and not here any more
        self._run: list[int] = []  # byte tokens held back, the beginning of valid UTF-8 so far
        self._run_check = codecs.getincrementaldecoder("utf-8")()
        self._broken_run: list[int] = []  # the tokens that broke the present run, if it is broken
        self._withheld = ""  # certain text that may be the beginning of a stop string

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        self._emitted = ["".join(self._emitted)]
        return self._emitted[0]

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that has become certain."""
        early = ids[: self._num_early_tokens]
        if not early:
            return self._push(ids)
        text = self._push(early)
        self._num_early_tokens -= len(early)
        if self._num_early_tokens == 0:
            self._num_early_chars = self._num_complete_in_run()
        return text + self._push(ids[len(early) :])

    def _push(self, ids: Sequence[int]) -> str:
        if self._finished:
            return ""
        ready: list[int] = []
        for token_id in ids:
            token = self._tokenizer.id_to_token(token_id)
            if token is None or (self._skip_special_tokens and self._tokenizer.is_special(token)):
                continue  # as if it were not there, for decode too
            byte = byte_of(token) if self._tokenizer.byte_fallback else None
            if byte is None:
                ready += [*self._run, token_id]
                self._run, self._broken_run = [], []
                self._run_check.reset()
            elif self._broken_run:
                ready.append(token_id)
            else:
                self._run.append(token_id)
                try:
                    self._run_check.decode(byte)
                except UnicodeDecodeError:
                    ready += self._run
                    self._run = []
                    self._broken_run = (self._window + ready[-_CONTEXT:])[-_CONTEXT:]
        return self._emit(self._decode(ready), last=False) if ready else ""

    def finish(self) -> str:
        """Returns the rest; a character that is not complete comes out as U+FFFD."""
        if self._finished:
            return ""
        self._finished = True
        return self._emit(self._decode(self._run, last=True), last=True)

    def _decode(self, ids: list[int], last: bool = False) -> str:
        """The certain text that `ids` add."""
        self._window += ids
        text = self._decode_window()
        held_back = text.endswith("\ufffd") and not last
        certain = len(text) - held_back
        piece = text[self._passed_on : certain]
        self._passed_on = certain
        if len(self._window) > _MAX_WINDOW:
            # A broken run stays broken only if what broke it stays in the window. One that is cut
            # within a character decodes to U+FFFD now, but what it stood for has been passed on.
            self._window = self._broken_run[:] or self._context()
            self._passed_on = len(self._decode_window()) - held_back
        return piece

    def _decode_window(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special_tokens)

    def _num_complete_in_run(self) -> int:
        """Characters of the run that is held back, without a last one that is not complete."""
        incomplete, _ = self._run_check.getstate()
        complete = self._run[: len(self._run) - len(incomplete)]
        if not complete:
            return 0
        text = self._tokenizer.decode(self._window + complete, self._skip_special_tokens)
        return len(text) - self._passed_on

    def _context(self) -> list[int]:
        """The shortest end of the window that has _CONTEXT tokens with text."""
        begin = len(self._window)
        missing = _CONTEXT
        while begin and missing:
            begin -= 1
            missing -= self._window[begin] != self._tokenizer.empty_token_id
        return self._window[begin:]

    def _emit(self, certain: str, last: bool) -> str:
        """Passes text on, as far as it cannot be a part of a stop string."""
        text = self._withheld + certain
        end = len(text)
        num_early = len(certain) if self._num_early_tokens else self._num_early_chars
        self._num_early_chars = max(num_early - len(certain), 0)
        first_that_counts = len(self._withheld) + num_early + 1
        for i, char in enumerate(certain if self._stops else "", len(self._withheld) + 1):
            complete = [stop.text for stop in self._stops if stop.read(char)]
            if complete and i >= first_that_counts:
                self.stop_reason = max(complete, key=len)  # of those that end here, the first
                self._finished = last = True
                end = i if self._include_stop else i - len(self.stop_reason)
                break
        if not last:
            end -= max((stop.matched for stop in self._stops), default=0)
        self._withheld = text[end:]
        self._emitted.append(text[:end])
        return text[:end]


class _StopString:
    """Looks for a string in a text that comes character by character (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # how many of its characters the text ends with
        self._border = [0]  # of text[: i + 1]: the longest end that is also its beginning
        for char in text[1:]:
            self._border.append(self._advance(self._border[-1], char))

    def _advance(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._border[matched - 1]
        return matched + (self.text[matched] == char)

    def read(self, char: str) -> bool:
        """Takes one character; true if it completes the string. Its end may begin another one."""
        self.matched = self._advance(self.matched, char)
        if self.matched < len(self.text):
            return False
        self.matched = self._border[-1]
        return True
