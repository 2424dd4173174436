"""Status codes of the search for sigma, and their messages."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """How the search for sigma ended: the codes in `SigmaSolution.status`.

    The members are integers, so a status can be compared with them inside `jax.jit` too. `message` says what went
    wrong and what to do about it.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxalign
        >>> solve = jax.jit(lambda x: jaxalign.solve_sigma(x, density=0.2))
        >>> solution = solve(jnp.ones((24, 3)))
        >>> jaxalign.Status(int(solution.status)).name, bool(solution.status == jaxalign.Status.INFEASIBLE)
        ('INFEASIBLE', True)
        >>> jaxalign.Status.BAD_DENSITY.message
        'The density is not between 0 and 1. Use one above 0 and below 1.'
    """

    message: str

    CONVERGED = 0, "Sigma was found."
    NOT_CONVERGED = 1, "The root-finder did not converge. Please report this with your data."
    INFEASIBLE = (
        2,
        "Too many samples are duplicates: the share of pairs at zero distance is not below the density, so no sigma "
        "reaches it. Remove duplicate samples, or use a larger density.",
    )
    NON_FINITE = 3, "The features hold nan or inf. Remove these samples, or exclude them with a mask."
    BAD_DENSITY = 4, "The density is not between 0 and 1. Use one above 0 and below 1."
    NO_SAMPLES = 5, "The mask leaves too few valid samples to form a pair. Mark at least two samples as valid."

    def __new__(cls, code: int, message: str) -> Status:
        """Create a member: an integer with a message."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.message = message
        return member
