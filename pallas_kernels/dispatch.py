"""Choose an implementation of an operator: one table, one rule.

An operator lists its implementations in order of preference. A caller who names one gets exactly that one or an error
with the reason; a caller who names none gets the first that supports the call, and hears once what was passed over.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class SlowerPathWarning(UserWarning):
    """A faster implementation was passed over; the message says which and why."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    `unsupported` takes the arguments of `run` and answers why this call can't run this way, or None if it can. It looks
    only at what is known while tracing: shapes, dtypes, static arguments, the default backend.
    """

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    for_tests: bool = False  # runs only when named


def dispatch(operator: str, implementations: Sequence[Implementation], name: str | None, *args, **kwargs):
    """Run `operator` with the implementation `name`, or with the first that supports the call.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named implementation does not support this call, or none does.
    """
    if name is not None:
        chosen = next((i for i in implementations if i.name == name), None)
        if chosen is None:
            known = ", ".join(i.name for i in implementations)
            raise ValueError(f"{operator}: implementation={name!r} is unknown; there are {known}")
        if reason := chosen.unsupported(*args, **kwargs):
            raise NotImplementedError(f"{operator}: implementation {name!r} can't run this call: {reason}")
        return chosen.run(*args, **kwargs)

    passed_over = []
    for implementation in (i for i in implementations if not i.for_tests):
        reason = implementation.unsupported(*args, **kwargs)
        if not reason:
            if passed_over:
                # Python shows one warning per text and place: the user hears each reason once.
                warnings.warn(
                    f"{operator} runs on {implementation.name!r}: {'; '.join(passed_over)}",
                    SlowerPathWarning,
                    stacklevel=3,
                )
            return implementation.run(*args, **kwargs)
        passed_over.append(f"{implementation.name!r} passed over ({reason})")
    raise NotImplementedError(f"{operator}: no implementation supports this call: {'; '.join(passed_over)}")
