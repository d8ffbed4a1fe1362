"""Operations with wrong results."""


def sabotaged(original, where):
    """``original`` with an error of a hundredth in its result or only in its gradient."""

    def call(x, **options):
        y = original(x, **options)
        if options["backend"] == "reference":
            return y
        return y * 1.01 if where == "result" else y * 1.01 - 0.01 * y.detach()

    return call
