"""What a prompt may be: tokens of the model, and room behind them."""

from __future__ import annotations

from flowspec_edge.errors import RequestError


def room_behind(prompt: tuple[int, ...], max_context: int, vocab_size: int) -> int:
    """How many tokens the model's context has room for after the prompt.

    Raises:
        RequestError: the prompt is empty, has what is no token, or fills the context.
    """
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise RequestError(f"the prompt has the token id {wrong}; the model's lie between 0 and {vocab_size - 1}")
    room = max_context - len(prompt)
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the model's context holds {max_context}; "
            f"shorten it to at most {max_context - 1}"
        )
    return room
