"""Every error that flowspec-edge raises on purpose.

All have one base class. Each text says who failed at what, the value, and the limit or the remedy, so that the last
line of a program's output is enough to know what to do next.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import Self

UNPRINTABLE = (
    "\\x00-\\x1f\\x7f-\\x9f"  # C0, DEL and C1: a terminal obeys them
    "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069"  # marks and overrides that turn the direction of writing
    "\\u2028\\u2029"  # line and paragraph separators
    "\\ud800-\\udfff"  # halves of surrogate pairs, which have no bytes
)
"""Characters, as a class of a regular expression has them, that no text from the network may bring to a terminal."""
_UNPRINTABLE = re.compile(f"[{UNPRINTABLE}]")
_UNPRINTABLE_BUT_BREAKS = re.compile(f"(?![\n\t])[{UNPRINTABLE}]")


def plain_text(text: str, *, keeps_breaks: bool = False) -> str:
    """The text with every character of :data:`UNPRINTABLE` escaped, so that it can be shown.

    With ``keeps_breaks`` line breaks and tabs stay, for texts of this machine that may have several lines.
    """
    return (_UNPRINTABLE_BUT_BREAKS if keeps_breaks else _UNPRINTABLE).sub(_escaped, text)


def is_plain(text: str) -> bool:
    """Whether a text has no character of :data:`UNPRINTABLE`, as every name of ours."""
    return _UNPRINTABLE.search(text) is None


def system_words(cause: BaseException) -> str:
    """What the system says of an error that it caused: words, without the numbers, paths and objects in Python's text.

    aiohttp wraps what the system said, and asyncio's own texts have its objects in them.
    """
    behind = getattr(cause, "os_error", cause)
    number = getattr(behind, "errno", None) or 0  # those of name look-ups are negative
    words = os.strerror(number) if number > 0 else getattr(behind, "strerror", None) or str(behind)
    return plain_text(words or type(behind).__name__)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def release_frames(error: BaseException) -> None:
    """Have an error that was caught, and those behind it, let go of the variables of the functions that they ended.

    An error holds these functions' frames. Where one of their variables leads back to the error the two lie in a
    reference cycle, and all that the frames hold stays until Python looks for those: links, rings, layers.
    """
    found, known = [error], set[int]()
    while found:
        one = found.pop()
        if id(one) not in known:
            known.add(id(one))
            traceback.clear_frames(one.__traceback__)
            found += [behind for behind in (one.__cause__, one.__context__) if behind is not None]
            found += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


class FlowspecError(Exception):
    """Base of every error that the user or a peer can cause. Its text is shown as it is, without a traceback."""

    def again(self) -> Self:
        """The same error, without where it was raised. One that is kept is raised like this, however often: it would
        gather the frames of all whom it met, and they what keeps it.
        """
        same = type(self).__new__(type(self), *self.args)
        same.__dict__.update(self.__dict__)
        same.__cause__ = self.__cause__
        return same


class BundleError(FlowspecError):
    """A model bundle is missing, broken, or of a format this version cannot read."""


class CheckpointError(FlowspecError):
    """A checkpoint cannot be exported: a file is missing, a tensor has a wrong shape, or the architecture
    is not known.
    """


class ParityError(FlowspecError):
    """An exported block or chain differs from the torch model by more than the stated tolerance."""


class QualityError(FlowspecError):
    """Every precision that was asked for loses too much of the model's quality. ``losses`` tells of each of them."""

    def __init__(self, losses: Iterable[str]) -> None:
        super().__init__(f"{'; '.join(losses)}: choose another --precision, or allow more with --max-loss")


class ProtocolError(FlowspecError):
    """A peer broke the rules of the wire. The fault is the peer's; the link is closed."""


class LinkLostError(FlowspecError):
    """A link to a peer ended before its work was done, or could not be opened.

    ``neighbour`` is the node at the other end where it was a data link: the peer itself may be well.
    """

    def __init__(self, text: str, *, neighbour: str = "") -> None:
        super().__init__(text)
        self.neighbour = neighbour


class AnswerLostError(LinkLostError):
    """A text ended unfinished, and no server went on with it. ``text`` and ``token_ids`` are what has come of it."""

    def __init__(self, reason: str, *, text: str, token_ids: Sequence[int]) -> None:
        super().__init__(reason)
        self.text, self.token_ids = text, list(token_ids)


class StageFailedError(FlowspecError):
    """A stage could not serve its part: out of capacity, a failed forward, or a lost peer."""


class CacheFullError(StageFailedError):
    """The cache of one session cannot grow. Others go on."""


class RowsTooLargeError(StageFailedError):
    """A hidden row of one session has a value that cannot travel in float16. Others go on."""

    def __init__(self, largest: float) -> None:
        super().__init__(
            f"a hidden row has a value of {largest:g}, which is beyond float16 (65504); let rows travel in bfloat16 or "
            "float32 (--hidden-rows)"
        )
        self.largest = largest


class RingLostError(StageFailedError):
    """A ring was lost, and another one may go on with its texts.

    ``lost`` are nodes that no longer answer. ``failed`` is a node that answers, and said that its stage failed.
    ``cut`` are two nodes that answer, or a node and the origin, of which the first said that it lost the second.
    """

    def __init__(
        self,
        text: str,
        *,
        lost: tuple[str, ...] = (),
        failed: str | None = None,
        cut: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(text)
        self.lost, self.failed, self.cut = lost, failed, cut


class PlacementError(FlowspecError):
    """The layers cannot be spread over the nodes that were found."""


class NotMeasuredError(PlacementError):
    """A plan needs the time of a layer, and no node has measured it yet."""


class RequestError(FlowspecError):
    """A request cannot be served as asked: the prompt is too long, or an option is out of range."""


class FieldError(RequestError):
    """A field or an option of a request is at fault: ``name`` is how the caller named it, ``fault`` says what is wrong.

    ``code`` is a word for programs.
    """

    def __init__(self, name: str, fault: str, code: str = "invalid_value") -> None:
        super().__init__(f"{name} {fault}")
        self.name, self.fault, self.code = name, fault, code

    def named(self, name: str) -> FieldError:
        """The same fault, for who calls the field otherwise."""
        return FieldError(name, self.fault, self.code)


class ApiKeyError(RequestError):
    """A server wants an API key, and got none or a wrong one."""


class PlainHttpError(RequestError):
    """An API key would leave this machine unencrypted."""


class GrammarError(RequestError):
    """A text cannot go on as its grammar asks, which has become too complex."""


class OtherBundleError(RequestError):
    """A text was begun with another bundle than the one that is asked to go on with it."""


class ServerBusyError(FlowspecError):
    """A server has as many texts to write as it takes. ``retry_after_s`` is when to ask again.

    ``is_crowded_by_one`` where the texts are those of the address that asks.
    """

    def __init__(self, text: str, *, retry_after_s: float = 0.0, is_crowded_by_one: bool = False) -> None:
        super().__init__(text)
        self.retry_after_s, self.is_crowded_by_one = retry_after_s, is_crowded_by_one


class AnswerTimeoutError(FlowspecError, TimeoutError):
    """An answer took longer than its client waits."""


class ServerEndingError(FlowspecError):
    """A server ends while it writes a text; another one, or the same started anew, may go on with it."""


class NodeUnavailableError(FlowspecError):
    """No node, or no origin, could be found or reached."""


class OtherKeyError(NodeUnavailableError):
    """A peer has another cluster key, or only one of the two sides has a key."""


class OtherVersionError(NodeUnavailableError):
    """A peer speaks another version of the protocol."""


class FetchError(FlowspecError):
    """Weights could not be fetched: no source has them, all sources were lost, or the remaining ones sent something
    else.
    """


class CacheError(FlowspecError):
    """The weight cache cannot hold a file: its limit or the disk is full, or its directory cannot be used."""


class BoardError(FlowspecError):
    """A board's profile cannot be used: a key is missing or unknown, or its value has a wrong type or is
    out of range.
    """


class TestbedError(FlowspecError):
    """A description of boards and network cannot be used: a key is missing, unknown or out of range."""

    __test__ = False  # tells pytest that this is no test, whatever its name


class LosslessError(FlowspecError):
    """A schedule wrote something other than the target. That is a bug, and the text names the prompt that shows it."""


class BenchError(FlowspecError):
    """A comparison cannot be run as asked, or one of its processes was lost."""


class KeyTextError(FlowspecError):
    """A text is no key: it is mistyped, cut off, or of another kind. The error never repeats the text."""


class ClusterKeyError(FlowspecError):
    """A cluster key is needed and there is none, or its file cannot be used."""


class StateError(FlowspecError):
    """A file that a node keeps between runs cannot be read or written."""


class TrainingError(FlowspecError):
    """The demo model cannot be trained or evaluated as asked: text is missing, or a run directory
    holds something else.
    """


class JournalError(FlowspecError):
    """A journal of a core cannot be read, or does not have what the core needs to run again."""
