"""1 - SSIM of feature maps and its gradient as two Triton kernels; `gpu.py` calls them.

    symbol      name                          equation (`definition.py` has the definitions)
    x', y'      maps about their level        scale (map - level)
    ux, uy      local means                   B[x'] + shift
    S           sum of the variances          B[x'^2 + y'^2] - B[x']^2 - B[y']^2
    Q           variance of the difference    B[(x' - y')^2] - B[x' - y']^2 = S - 2 cov_xy
    l           luminance                     1 - l = (ux - uy)^2 / (ux^2 + uy^2 + C1)
    cs          contrast times structure      1 - cs = Q / (S + C2); in 1 - l and 1 - cs nothing
                                              cancels where the maps agree
    u, v, d     slopes of l cs by -Q, S, ux   u = 2 l / (S + C2),  v = u (1 - cs),
                                              d = 2 cs (uy - l ux) / (ux^2 + uy^2 + C1)
                                                  + u B[x' - y'] - v B[x']
    gradient    of the sum of l cs by x       B* d + x' B* v - (x' - y') B* u

B is the Gaussian window G over what it covers, B x = (G x) / (G 1), so its adjoint is
B* d = G (d / (G 1)); with border "zero" G 1 is 1. G runs along the columns by shifted loads and
down the rows by partial sums: a program owns a strip of columns of one map and walks down some
rows. Each row adds to the 2 radius + 1 windows it lies in, kept in registers, and completes one.

Memory traffic in float32 maps: the forward kernel reads 2 and writes u, v, d (with a margin of
zeros, so that the backward kernel needs no border); the backward kernel reads 5 and writes 1. There
are no atomics: sums go to one cell per program, so that equal inputs give equal bits.
"""
# mypy: ignore-errors
# (in a kernel, tuples grow and numbers are tensors)

import triton
import triton.language as tl

# Sizes vary from step to step: one compilation for all. (Triton would specialize them in a tuple.)
_STRIDES = ["x_map", "x_row", "y_map", "y_row", "gradient_map", "gradient_row"]
_SIZES = ["height", "width", "strips", "chunks", "rows"]
_MAPS = ["x", "y", "affine", "slopes", "sums", "gradient"]  # an image of a batch may lie anywhere
_jit = triton.jit(do_not_specialize=[*_STRIDES, *_SIZES], do_not_specialize_on_alignment=_MAPS)


@_jit
def _place(strips, chunks):
    """This program's map, its chunk of rows and its strip of columns; the number of maps."""
    program, each = tl.program_id(0), strips * chunks
    return program // each, program // strips % chunks, program % strips, tl.num_programs(0) // each


@_jit
def _open(maps, map_stride, affine, index, count):
    """A map's first cell, its level, scale and shift."""
    numbers = affine + index
    first = maps + index.to(tl.int64) * map_stride
    return first, tl.load(numbers), tl.load(numbers + count), tl.load(numbers + 2 * count)


@_jit
def _within(cell, size):
    """0 <= cell < size in one comparison: negative numbers become large."""
    return tl.cast(cell, tl.uint32, bitcast=True) < tl.cast(size, tl.uint32, bitcast=True)


@_jit
def _coverage(cell, size, weights: tl.constexpr, radius: tl.constexpr):
    """G 1 along one axis: the share of the window around a cell that lies inside."""
    share = cell * 0.0
    for k in tl.static_range(2 * radius + 1):
        seen = cell + (k - radius)
        share += tl.where(_within(seen, size), weights[k], 0.0)
    return share


@_jit
def _slide(partial, value, weights: tl.constexpr, radius: tl.constexpr):
    """Adds a row to the windows it lies in: the sum of the complete one, and the others."""
    sums = ()
    for k in tl.static_range(2 * radius):
        sums += (partial[k] + weights[k] * value,)
    sums += (weights[2 * radius] * value,)
    return sums[0], sums[1:]


@_jit
def forward_kernel(
    x, y, x_map, x_row, y_map, y_row, affine, height, width,
    strips, chunks, rows, slopes, sums, c1, c2,
    renormalize: tl.constexpr, luminance: tl.constexpr, with_slopes: tl.constexpr,
    weights: tl.constexpr, radius: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """1 - SSIM, summed in parts, and its slopes.

    Args:
        x, y: maps of the student and the teacher; x_map, x_row, y_map, y_row: their strides.
        affine: (6, maps) level, scale, shift of x, of y.
        strips: of columns in a map; chunks: of rows in a map; rows: of a chunk. A program computes
            one chunk of one strip.
        slopes: (3, maps, height + 2 radius, width + 2 radius), d, v, u over G 1.
        sums: each program's part of its map's sum of 1 - SSIM.
    """
    index, chunk, strip, count = _place(strips, chunks)
    x, x_level, x_scale, x_shift = _open(x, x_map, affine, index, count)
    y, y_level, y_scale, y_shift = _open(y, y_map, affine + 3 * count, index, count)
    column = strip * block - radius + tl.arange(0, block)
    start = chunk * rows - radius
    stop = tl.minimum(start + rows, height + radius)
    pitch = (width + 2 * radius).to(tl.int64)
    plane = (height + 2 * radius) * pitch
    slopes += index * plane + radius * pitch + radius
    by_column = 1.0 / _coverage(column, width, weights, radius)
    zero = tl.zeros((block,), tl.float32)
    x_part = (zero,) * (2 * radius)
    y_part, s_part, q_part = x_part, x_part, x_part
    total = zero
    for row in range(start - radius, stop + radius):
        bx, by, bs, bq = zero, zero, zero, zero
        x_cell = x + row * x_row.to(tl.int64) + column
        y_cell = y + row * y_row.to(tl.int64) + column
        for k in tl.static_range(2 * radius + 1):
            inside = _within(column + (k - radius), width) & _within(row, height)
            a = tl.load(x_cell + (k - radius), inside, x_level).to(tl.float32)
            b = tl.load(y_cell + (k - radius), inside, y_level).to(tl.float32)
            a, b = (a - x_level) * x_scale, (b - y_level) * y_scale  # 0 for the fill and flat maps
            if not renormalize:  # 0 outside is not the level
                a, b = tl.where(inside, a, -x_shift), tl.where(inside, b, -y_shift)
            bx += weights[k] * a
            by += weights[k] * b
            bs += weights[k] * (a * a + b * b)
            bq += weights[k] * ((a - b) * (a - b))
        bx, x_part = _slide(x_part, bx, weights, radius)
        by, y_part = _slide(y_part, by, weights, radius)
        bs, s_part = _slide(s_part, bs, weights, radius)
        bq, q_part = _slide(q_part, bq, weights, radius)
        center = row - radius
        weight = by_column if renormalize else zero + 1.0
        if renormalize and ((center < radius) | (center >= height - radius)):
            weight = by_column / _coverage(center, height, weights, radius)
        bx, by, bs, bq = bx * weight, by * weight, bs * weight, bq * weight
        s, q = bs - bx * bx - by * by, bq - (bx - by) * (bx - by)
        s = tl.where(s < 0.0, 0.0, s)  # not tl.maximum, which takes 0 for NaN
        q = tl.where(q < 0.0, 0.0, tl.where(q > 2.0 * s, 2.0 * s, q))
        per_s = 1.0 / (s + c2)
        one_minus_cs = q * per_s
        ux, uy = bx + x_shift, by + y_shift
        per_l = 1.0 / (ux * ux + uy * uy + c1)
        one_minus_l = (ux - uy) * (ux - uy) * per_l if luminance else zero
        inside = (center >= start) & _within(center, height) & _within(column, width)
        total += tl.where(inside, one_minus_l + (1.0 - one_minus_l) * one_minus_cs, 0.0)
        if with_slopes:
            u = 2.0 * (1.0 - one_minus_l) * per_s
            d = u * (bx - by - one_minus_cs * bx)
            if luminance:
                d += 2.0 * (1.0 - one_minus_cs) * (uy - ux + one_minus_l * ux) * per_l
            cell = slopes + center * pitch + column
            stored = (center >= start) & (column < width + radius)
            tl.store(cell, tl.where(inside, d * weight, 0.0), stored)
            tl.store(cell + count * plane, tl.where(inside, u * one_minus_cs * weight, 0.0), stored)
            tl.store(cell + 2 * count * plane, tl.where(inside, u * weight, 0.0), stored)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@_jit
def backward_kernel(
    x, y, x_map, x_row, y_map, y_row, affine, height, width,
    strips, chunks, rows, slopes, gradient, gradient_map, gradient_row, sums, factor,
    weights: tl.constexpr, radius: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum of 1 - SSIM, and sums over it.

    Args:
        gradient: (maps, height, width), by x, times factor.
        sums: (2, programs), each program's part of the sums of the gradient by the normalised x,
            and of that times x'.
    """
    index, chunk, strip, count = _place(strips, chunks)
    x, x_level, x_scale, _ = _open(x, x_map, affine, index, count)
    y, y_level, y_scale, _ = _open(y, y_map, affine + 3 * count, index, count)
    column = strip * block + tl.arange(0, block)
    start = chunk * rows
    stop = tl.minimum(start + rows, height)
    pitch = (width + 2 * radius).to(tl.int64)
    plane = (height + 2 * radius) * pitch
    slopes += index * plane + radius * pitch
    gradient += index.to(tl.int64) * gradient_map
    zero = tl.zeros((block,), tl.float32)
    d_part = (zero,) * (2 * radius)
    v_part, u_part = d_part, d_part
    total, moment = zero, zero
    for row in range(start - radius, stop + radius):
        d, v, u = zero, zero, zero
        d_row = slopes + row * pitch + column
        v_row, u_row = d_row + count * plane, d_row + 2 * count * plane
        for k in tl.static_range(2 * radius + 1):
            d += weights[k] * tl.load(d_row + k, column < width)
            v += weights[k] * tl.load(v_row + k, column < width)
            u += weights[k] * tl.load(u_row + k, column < width)
        d, d_part = _slide(d_part, d, weights, radius)
        v, v_part = _slide(v_part, v, weights, radius)
        u, u_part = _slide(u_part, u, weights, radius)
        center = row - radius
        inside = (center >= start) & (column < width)
        x_cell = x + center * x_row.to(tl.int64) + column
        y_cell = y + center * y_row.to(tl.int64) + column
        a = (tl.load(x_cell, inside).to(tl.float32) - x_level) * x_scale
        b = (tl.load(y_cell, inside).to(tl.float32) - y_level) * y_scale
        by_cell = tl.where(inside, (a - b) * u - d - a * v, 0.0)
        total += by_cell
        moment += tl.where(inside, by_cell * a, 0.0)
        cell = gradient + center * gradient_row.to(tl.int64) + column
        tl.store(cell, by_cell * (x_scale * factor), inside)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(moment, 0))
