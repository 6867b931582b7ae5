"""The errors and warnings of initjax: each says what was given, what is accepted, why, and what to do next."""


class InputError(ValueError):
    """A request that cannot be answered, told in four parts.

    Parameters
    ----------
    given : what was given, with its value.
    accepted : what is accepted instead.
    why : the reason.
    remedy : what to do next.
    """

    def __init__(self, given: str, accepted: str, why: str, remedy: str):
        self.given, self.accepted, self.why, self.remedy = given, accepted, why, remedy
        super().__init__(f"{given}\n  Accepted: {accepted}\n  Why: {why}\n  Try: {remedy}")

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """The four parts, in order."""
        return self.given, self.accepted, self.why, self.remedy

    def __reduce__(self):
        return type(self), self.parts


class NotElementwiseError(InputError):
    """An activation that changes shapes, mixes entries, or cannot be traced."""


class TracedParameterError(NotElementwiseError):
    """An activation that closes over a tracer, so that its values are not known."""


class QuadratureError(InputError):
    """A Gaussian expectation that does not exist or that could not be computed to the promised accuracy."""


class NoCriticalPointError(InputError):
    """No sigma_w puts this activation on the edge of chaos at this sigma_b."""


class UnattainableTargetError(InputError):
    """A target that no transformation of this activation meets in this network.

    The attribute `attainable` is the most that it reaches (nan where that is not known).
    """

    def __init__(self, given: str, accepted: str, why: str, remedy: str, attainable: float = float("nan")):
        super().__init__(given, accepted, why, remedy)
        self.attainable = attainable

    def __reduce__(self):
        return type(self), (*self.parts, self.attainable)


class UnsupportedLayerError(InputError):
    """A layer that the exact infinite-width theory does not cover.

    The attributes `layer` and `primitive` name the place in the model.
    """

    def __init__(self, given: str, accepted: str, why: str, remedy: str, layer: str = "", primitive: str = ""):
        super().__init__(given, accepted, why, remedy)
        self.layer, self.primitive = layer, primitive

    def __reduce__(self):
        return type(self), (self.given, self.accepted, self.why, self.remedy, self.layer, self.primitive)


class PartialKernelError(RuntimeError):
    """A kernel that stopped before it was complete; what is done is kept.

    Attributes
    ----------
    kernel : NumPy array of the whole kernel, NaN where it is missing.
    done : which pairs of examples are complete, bool (n1, n2).
    resume : `resume()` computes what is missing and returns the kernel.
    """

    def __init__(self, kernel, done, resume, error):
        self.kernel, self.done, self.resume = kernel, done, resume
        super().__init__(
            f"{done.mean():.0%} of the kernel was computed when {type(error).__name__} was raised: {error}\n"
            "  Accepted: programs that run to their end on every block\n"
            "  Why: a block failed, or was interrupted; the others are in `.kernel`, NaN where missing\n"
            "  Try: `.resume()` once the cause is gone; where memory ran out, a smaller memory=..."
        )


class UnstableCriticalPointWarning(UserWarning):
    """The returned point has chi_1 = 1, but the variance map leaves it (chi_q > 1)."""


class UnreliableExpansionWarning(UserWarning):
    """First order in 1/width is no estimate here: the network is too deep for its width, or near bistability."""


class UnnormalisedInputsWarning(UserWarning):
    """The inputs are far from second moment 1, or differ widely in it; `quantity` and `value` carry the number."""

    def __init__(self, message: str, quantity: str = "", value: float = float("nan")):
        super().__init__(message)
        self.quantity, self.value = quantity, value

    def __reduce__(self):
        return type(self), (*self.args, self.quantity, self.value)
