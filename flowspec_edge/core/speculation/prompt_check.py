"""What a prompt may be: tokens of the model, and room behind them."""

from __future__ import annotations

from collections.abc import Container, Sequence

from flowspec_edge.errors import RequestError


def room_behind(prompt: Sequence[int], max_context: int, vocab_size: int) -> int:
    """How many tokens the model's context has room for after the prompt.

    Raises:
        RequestError: the prompt is empty, has what is no token, or fills the context.
    """
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    check_tokens("the prompt", prompt, vocab_size)
    room = max_context - len(prompt)
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the model's context holds {max_context}; "
            f"shorten it to at most {max_context - 1}"
        )
    return room


def check_tokens(what: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError, which names ``what`` they are, where one of them is no token of the model."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise RequestError(f"{what} has the token id {wrong}; the model's lie between 0 and {vocab_size - 1}")


def ending_of(tokens: Sequence[int], num_wanted: int, end_token_ids: Container[int]) -> str | None:
    """Why a text that has these tokens, of ``num_wanted`` at most, has ended already: ``stop`` or ``length``, or None.

    Raises:
        RequestError: there are more tokens than were wanted.
    """
    if len(tokens) > num_wanted:
        raise RequestError(
            f"{len(tokens)} tokens of the text are given, where max_tokens and the model's context allow {num_wanted}"
        )
    if tokens and tokens[-1] in end_token_ids:
        return "stop"
    return "length" if len(tokens) == num_wanted else None
