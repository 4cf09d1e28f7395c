"""Why there are no compiled kernels."""


class BuildError(Exception):
    """The kernels cannot be built here, or their build failed; the message says why, in the compiler's own words."""
