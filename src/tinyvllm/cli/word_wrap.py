"""Breaks the lines of a text between words while it comes; a terminal breaks them anywhere."""

from __future__ import annotations

from prompt_toolkit.utils import get_cwidth

_LONGEST_WORD = 32  # columns that are held back at most until a word ends


class WordWrap:
    """Text goes in as it comes and comes out as it is to be shown, a word behind."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._column = 0  # of the cursor
        self._spaces = ""  # before the word
        self._word = ""  # that has not ended yet
        self._word_width = 0

    def push(self, text: str) -> str:
        shown = ""
        for char in text:
            if char == "\n":
                shown += self._take() + char
                self._column, self._spaces = 0, ""
            elif char in " \t":
                shown += self._take()
                self._spaces += " "
            else:
                self._word += char
                width = get_cwidth(char)
                self._word_width += width
                # Writing without spaces has wide characters; it breaks where the terminal does it.
                if width > 1 or self._word_width >= _LONGEST_WORD:
                    shown += self._take()
        return shown

    def finish(self) -> str:
        """What is left."""
        return self._take()

    def _take(self) -> str:
        """The word and what stands before it: its spaces, or a line end where it does not fit."""
        if not self._word:
            return ""
        before = self._spaces
        width = len(before) + self._word_width
        if before and self._column > 0 and self._column + width > self._columns:
            before, width, self._column = "\n", self._word_width, 0
        self._column += width
        if self._column > self._columns:  # the terminal has broken it
            self._column = (self._column - 1) % self._columns + 1
        word = self._word
        self._spaces, self._word, self._word_width = "", "", 0
        return before + word
