"""SSIM of feature maps and its gradient as two Triton kernels; `ssim_triton.py` calls them.

    symbol      name                          equation (`ssim.py` has the definitions)
    x', y'      maps about their level        scale (map - level), level: mean of 64 of its cells
    ux, uy      local means                   B[x] = B[x'] + scale (level - offset)
    S           sum of the variances          B[x'^2 + y'^2] - B[x']^2 - B[y']^2
    Q           variance of the difference    B[(x' - y')^2] - B[x' - y']^2 = S - 2 cov_xy
    1 - l       lack of luminance             (ux - uy)^2 / (ux^2 + uy^2 + C1)
    1 - cs      lack of contrast, structure   Q / (S + C2); nothing cancels where the maps agree
    u, v, d     slopes: -dQ, dS and ux        u = 2 l / (S + C2),  v = u (1 - cs),
                                              d = 2 cs (uy - l ux) / (ux^2 + uy^2 + C1)
                                                  + u B[x' - y'] - v B[x']
    gradient    of the sum of l cs by x       B* d + x' B* v - (x' - y') B* u

B is the Gaussian window G over what it covers, B x = (G x) / (G 1), so its adjoint is
B* d = G (d / (G 1)); with border "zero" G 1 is 1. G runs along the columns by shifted loads and
down the rows by partial sums: a program owns a strip of columns of one map and walks down some
rows; each row adds to the 2 radius + 1 windows it lies in, kept in registers, and completes one.

Memory traffic in float32 maps: the forward kernel reads 2 and writes u, v, d (with a margin of
zeros, so that the backward kernel knows no border); the backward kernel reads 5 and writes 1. There
are no atomics: sums go to one cell per program, so that equal inputs give equal bits.
"""
# mypy: ignore-errors
# (in a kernel, tuples grow and numbers are tensors)

import triton
import triton.language as tl

# Sizes vary from step to step: one compilation for all. (Inside a tuple they would not be spared.)
_STRIDES = ["sn", "sc", "sh", "tn", "tc", "th"]
_SIZES = ["channels", "height", "width", "strips", "chunks", "rows"]
_jit = triton.jit(do_not_specialize=[*_STRIDES, *_SIZES])


@_jit
def _place(sizes, channels, strips, chunks):
    """This program's map, its chunk of rows and strip of columns, its image's height and width."""
    program = tl.program_id(0)
    index = program // (strips * chunks)
    image = sizes + index // channels * 2
    h, w = tl.load(image).to(tl.int32), tl.load(image + 1).to(tl.int32)
    return index, program // strips % chunks, program % strips, h, w


@_jit
def _open(maps, sn, sc, sh, index, channels, affine, count, h, w):
    """A map's first cell, its offset and scale, its level."""
    image, channel = (index // channels).to(tl.int64), (index % channels).to(tl.int64)
    first = maps + image * sn + channel * sc
    cells = tl.arange(0, 64)  # a power of two: the level of a flat map is exact
    row, column = (cells // 8 * 2 + 1) * h // 16, (cells % 8 * 2 + 1) * w // 16
    level = tl.sum(tl.load(first + row * sh + column).to(tl.float32), 0) / 64
    level = level.to(maps.dtype.element_ty).to(tl.float32)  # a value that loads can fill in
    return first, tl.load(affine + index), tl.load(affine + count + index), level


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
    student, teacher, affine, sizes, sn, sc, sh, tn, tc, th, channels, height, width,
    strips, chunks, rows, slopes, sums, c1, c2,
    renormalize: tl.constexpr, luminance: tl.constexpr, with_slopes: tl.constexpr,
    weights: tl.constexpr, radius: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The loss, in parts, and its slopes.

    Args:
        student, teacher: maps; sn, sc, sh, tn, tc, th: their strides of n, c and rows.
        affine: (4, N, C) offset and scale of the student, of the teacher.
        sizes: (N, 2) rows and columns of each image.
        strips, chunks, rows: of columns; of rows; of a chunk. A program has one of each of a map.
        slopes: (3, N, C, H + 2 radius, W + 2 radius), d, v, u over G 1; 0 outside an image.
        sums: each program's part of its image's loss.
    """
    index, chunk, strip, h, w = _place(sizes, channels, strips, chunks)
    count = tl.num_programs(0) // (strips * chunks)
    x, x_offset, x_scale, x_level = _open(student, sn, sc, sh, index, channels, affine, count, h, w)
    y, y_offset, y_scale, y_level = _open(
        teacher, tn, tc, th, index, channels, affine + 2 * count, count, h, w
    )
    x_mean, y_mean = (x_level - x_offset) * x_scale, (y_level - y_offset) * y_scale
    column = strip * block - radius + tl.arange(0, block)
    start = chunk * rows - radius
    stop = tl.minimum(start + rows, h + radius)
    stop = tl.where(strip * block < w + 2 * radius, stop, start - 2 * radius)  # beyond it: no row
    pitch = width + 2 * radius
    plane = (height + 2 * radius).to(tl.int64) * pitch
    slopes += index * plane + radius * pitch + radius
    by_column = 1.0 / _coverage(column, w, weights, radius)
    zero = tl.zeros((block,), tl.float32)
    x_part = (zero,) * (2 * radius)
    y_part, s_part, q_part = x_part, x_part, x_part
    total = zero
    for row in range(start - radius, stop + radius):
        bx, by, bs, bq = zero, zero, zero, zero
        x_row, y_row = x + row * sh + column, y + row * th + column
        for k in tl.static_range(2 * radius + 1):
            inside = _within(column + (k - radius), w) & _within(row, h)
            a = tl.load(x_row + (k - radius), inside, x_level).to(tl.float32)
            b = tl.load(y_row + (k - radius), inside, y_level).to(tl.float32)
            a, b = (a - x_level) * x_scale, (b - y_level) * y_scale  # 0 for the fill and flat maps
            if not renormalize:  # 0 outside is not the level
                a, b = tl.where(inside, a, -x_mean), tl.where(inside, b, -y_mean)
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
        if renormalize and ((center < radius) | (center >= h - radius)):
            weight = by_column / _coverage(center, h, weights, radius)
        bx, by, bs, bq = bx * weight, by * weight, bs * weight, bq * weight
        s, q = bs - bx * bx - by * by, bq - (bx - by) * (bx - by)
        s = tl.where(s < 0.0, 0.0, s)  # not tl.maximum, which takes 0 for NaN
        q = tl.where(q < 0.0, 0.0, tl.where(q > 2.0 * s, 2.0 * s, q))
        per_s = 1.0 / (s + c2)
        lack = q * per_s  # 1 - cs
        ux, uy = bx + x_mean, by + y_mean
        per_l = 1.0 / (ux * ux + uy * uy + c1)
        dark = (ux - uy) * (ux - uy) * per_l if luminance else zero  # 1 - l
        inside = (center >= start) & _within(center, h) & _within(column, w)
        total += tl.where(inside, dark + (1.0 - dark) * lack, 0.0)
        if with_slopes:
            u = 2.0 * (1.0 - dark) * per_s
            d = u * (bx - by - lack * bx)
            if luminance:
                d += 2.0 * (1.0 - lack) * (uy - ux + dark * ux) * per_l
            cell = slopes + center * pitch + column
            stored = (center >= start) & (column < width + radius)
            tl.store(cell, tl.where(inside, d * weight, 0.0), stored)
            tl.store(cell + count * plane, tl.where(inside, u * lack * weight, 0.0), stored)
            tl.store(cell + 2 * count * plane, tl.where(inside, u * weight, 0.0), stored)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0) * 0.5 / (h * w * channels))


@_jit
def backward_kernel(
    student, teacher, affine, sizes, sn, sc, sh, tn, tc, th, channels, height, width,
    strips, chunks, rows, slopes, upstream, gradient, sums,
    weights: tl.constexpr, radius: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Gradient by the student, (N, C, H, W), and each program's part of those by offset, scale.

    Args:
        upstream: (N,) gradient by the images' losses.
        gradient: (N, C, H, W), of the student's type; 0 outside an image.
        sums: (2, programs), by offset and by scale of the student.
    """
    index, chunk, strip, h, w = _place(sizes, channels, strips, chunks)
    count = tl.num_programs(0) // (strips * chunks)
    x, x_offset, x_scale, x_level = _open(student, sn, sc, sh, index, channels, affine, count, h, w)
    y, _, y_scale, y_level = _open(
        teacher, tn, tc, th, index, channels, affine + 2 * count, count, h, w
    )
    factor = tl.load(upstream + index // channels) * -0.5 / (h * w * channels)
    column = strip * block + tl.arange(0, block)
    start = chunk * rows
    last = tl.minimum(start + rows, height)
    stop = tl.where(strip * block < w, tl.minimum(last, h), start - 2 * radius)
    pitch = width + 2 * radius
    plane = (height + 2 * radius).to(tl.int64) * pitch
    slopes += index * plane + radius * pitch
    gradient += index.to(tl.int64) * height * width
    zero = tl.zeros((block,), tl.float32)
    d_part = (zero,) * (2 * radius)
    v_part, u_part = d_part, d_part
    by_offset, by_scale = zero, zero
    for row in range(start - radius, stop + radius):
        d, v, u = zero, zero, zero
        d_row = slopes + row * pitch + column
        v_row, u_row = d_row + count * plane, d_row + 2 * count * plane
        for k in tl.static_range(2 * radius + 1):
            d += weights[k] * tl.load(d_row + k, column < w)
            v += weights[k] * tl.load(v_row + k, column < w)
            u += weights[k] * tl.load(u_row + k, column < w)
        d, d_part = _slide(d_part, d, weights, radius)
        v, v_part = _slide(v_part, v, weights, radius)
        u, u_part = _slide(u_part, u, weights, radius)
        center = row - radius
        inside = (center >= start) & (column < w)
        raw = tl.load(x + center * sh + column, inside).to(tl.float32)
        a = (raw - x_level) * x_scale
        b = tl.load(y + center * th + column, inside).to(tl.float32)
        b = (b - y_level) * y_scale
        by_cell = tl.where(inside, factor * (d + a * v - (a - b) * u), 0.0)
        by_offset -= by_cell
        by_scale += tl.where(inside, by_cell * (raw - x_offset), 0.0)
        stored = (center >= start) & (column < width)
        tl.store(gradient + center * width + column, by_cell * x_scale, stored)
    for row in range(tl.maximum(start, stop), last):  # padding
        tl.store(gradient + row * width + column, zero, column < width)
    tl.store(sums + tl.program_id(0), tl.sum(by_offset, 0) * x_scale)
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(by_scale, 0))
