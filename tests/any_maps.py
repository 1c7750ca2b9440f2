"""Strategies of hypothesis that draw maps for a test.

Shapes go from one cell up, values from all equal to extreme ones, in several memory layouts. The
draws are the same in every run.
"""

import torch
from hypothesis import strategies as st

EXAMPLES = {"deadline": None, "derandomize": True, "database": None}
LAYOUTS = {
    "dense": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cut out": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
}
layouts = st.sampled_from(sorted(LAYOUTS))
shapes = st.tuples(*(st.integers(1, n) for n in (3, 4, 19, 23)))


@st.composite
def maps(draw, shape=shapes, largest=1e4):
    """A map (N, C, H, W) in float32: noise, steps, a ramp or one value, scaled and shifted."""
    n, c, h, w = draw(shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["noise", "steps", "ramp", "flat", "spike"]))
    x = torch.randn(n, c, h, w, generator=generator)
    if kind == "steps":
        x = x.sign()
    elif kind == "ramp":
        x = torch.linspace(0, 1, h * w).view(1, 1, h, w).expand(n, c, h, w)
    elif kind == "flat":
        x = torch.zeros(n, c, h, w)
    elif kind == "spike":
        x = (x == x.amax()).float()
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, largest]))
    return x * scale + draw(st.sampled_from([0.0, 1.0, -100.0]))


@st.composite
def pairs(draw, **kinds):
    """Two maps of one shape."""
    shape = st.just(draw(kinds.pop("shape", shapes)))
    return draw(maps(shape, **kinds)), draw(maps(shape, **kinds))
