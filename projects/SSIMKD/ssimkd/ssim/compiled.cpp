// 1 - SSIM of maps and the gradient of its sum, with the formulas and names of analytic.py.
//
// It works on one row at a time. The rows of x', v', u'^2, v'^2 are averaged across, and the last
// few of these averages downwards. The slopes go back in the same way. So everything that is in use
// at a time stays in a core's cache.

#include <algorithm>
#include <vector>

typedef long long Int;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
static const Int LANES = 16;

struct Maps {
  float *data;
  Int map, row;  // from one map or row to the next, in floats
  float *at(Int m, Int r) const { return data + m * map + r * row; }
};

// B along one axis: result i is the sum over k of weights[k][i] * cell[i + k - before]
struct Axis {
  Int cells, results, taps, before;
  const float *weights, *adjoint;  // (taps, whole Vecs of results) and (taps, whole Vecs of cells)
};

static Int whole(Int n) { return (n + LANES - 1) / LANES * LANES; }
static Vec load(const float *p) { return *(const Vec *)p; }
static void store(float *p, Vec v) { *(Vec *)p = v; }

// The same for the first n numbers: the others are loaded as 0, and are not stored.
static Vec load(const float *p, Int n) {
  if (n >= LANES) return load(p);
  Vec v = {};
  for (Int i = 0; i < n; i++) v[i] = p[i];
  return v;
}

static void store(float *p, Vec v, Int n) {
  if (n >= LANES) return store(p, v);
  for (Int i = 0; i < n; i++) p[i] = v[i];
}

static float sum(Vec v) {
  float result = 0;
  for (Int i = 0; i < LANES; i++) result += v[i];
  return result;
}

// Averages P rows across: from `in`, rows that are `step` floats apart, to `out`, whole(n) apart.
template <int P>
static void across(const float *in, Int step, float *out, const float *weights, Int taps, Int n) {
  const Int width = whole(n);
  for (Int j = 0; j < n; j += LANES) {
    Vec a[P] = {};
    for (Int k = 0; k < taps; k++) {
      const Vec weight = load(weights + k * width + j);
      for (int p = 0; p < P; p++) a[p] += weight * load(in + p * step + j + k);
    }
    for (int p = 0; p < P; p++) store(out + p * width + j, a[p]);
  }
}

// The last `taps` rows of P maps, of which LANES columns at a time are averaged downwards.
template <int P>
struct Ring {
  Int taps, width, from, to;
  std::vector<float> memory;
  std::vector<const float *> rows;
  std::vector<float> weight;

  Ring(Int taps, Int width)
      : taps(taps), width(width), memory(taps * P * width), rows(taps), weight(taps) {}

  float *row(Int r) { return memory.data() + r % taps * P * width; }

  // Moves on to result i of an axis that has `cells` rows and these weights, (taps, step).
  void turn(Int i, Int before, Int cells, const float *weights, Int step) {
    from = std::max(Int(0), before - i);
    to = std::min(taps, cells + before - i);
    for (Int k = from; k < to; k++) {
      rows[k] = row(i - before + k);
      weight[k] = weights[k * step + i];
    }
  }

  void down(Int j, Vec (&a)[P]) const {
    for (int p = 0; p < P; p++) a[p] = Vec{};
    for (Int k = from; k < to; k++)
      for (int p = 0; p < P; p++) a[p] += weight[k] * load(rows[k] + p * width + j);
  }
};

// What brings a map near 0 and to its normalised values: x' = (x - level) * scale, z = x' + shift.
struct Affine {
  float level_x, scale_x, shift_x, level_y, scale_y, shift_y;
};

struct Work {
  Axis rows, columns;
  Int edge, step;      // of lines: cells before the first, cells in sum
  float c1, c2, factor;
  std::vector<float> line, slopes;  // what is beyond the map has the weight 0, but must be finite
  Ring<4> means;
  Ring<3> back;

  Work(Axis rows, Axis columns, float c1, float c2, float factor)
      : rows(rows), columns(columns), edge(whole(columns.taps)),
        step(edge + whole(std::max(columns.cells, columns.results) + columns.taps) + LANES),
        c1(c1), c2(c2), factor(factor), line(4 * step), slopes(3 * step),
        means(rows.taps, whole(columns.results)), back(rows.taps, whole(columns.cells)) {}

  void fill(const Affine &q, const float *x, const float *y) {
    for (Int j = 0; j < columns.cells; j += LANES) {
      const Vec a = (load(x + j, columns.cells - j) - q.level_x) * q.scale_x;
      const Vec b = (load(y + j, columns.cells - j) - q.level_y) * q.scale_y;
      const Vec stack[4] = {a, a - b, (a + b) * (a + b), (a - b) * (a - b)};
      for (int p = 0; p < 4; p++) store(line.data() + p * step + edge + j, stack[p]);
    }
  }

  // Sum of 1 - SSIM over a row of results; fills their slopes if there is a gradient.
  template <bool GRADIENT>
  double compare(const Affine &q) {
    const Vec zero = {};
    Vec total = {};
    for (Int at = 0; at < columns.results; at += LANES) {
      Vec mean[4];
      means.down(at, mean);
      Vec x = mean[0], v = mean[1], u = 2 * x - v;
      Vec var_u = mean[2] - u * u, var_v = mean[3] - v * v;
      var_u = var_u < 0 ? zero : var_u;  // NaN stays NaN
      var_v = var_v < 0 ? zero : var_v;
      const Vec by_var = 1 / (var_u + var_v + 2 * c2), k = var_v * by_var;
      const Vec d_mean = v - 2 * k * x;
      x += q.shift_x;
      v += q.shift_x - q.shift_y;
      u += q.shift_x + q.shift_y;
      const Vec by_power = 1 / (u * u + v * v + 2 * c1), j = v * v * by_power;
      const Vec luminance = 1 - 2 * j;
      Vec dissimilarity = j + k * luminance;
      for (Int i = columns.results - at; i < LANES; i++) dissimilarity[i] = 0;
      total += dissimilarity;
      if (!GRADIENT) continue;
      const Vec f = (2 * j * x - v) * by_power, t = luminance * by_var;
      const Vec slope[3] = {(1 - 2 * k) * f + t * d_mean, k * t, t};
      for (int p = 0; p < 3; p++) store(slopes.data() + p * step + edge + at, slope[p]);
    }
    return 2 * sum(total);
  }

  // A row of the gradient; adds to the sums of slope and slope times x'.
  void finish(const Affine &q, const float *x, const float *y, float *gradient, double *into) {
    Vec totals[2] = {};
    for (Int j = 0; j < columns.cells; j += LANES) {
      const Int n = columns.cells - j;
      Vec d[3];
      back.down(j, d);
      const Vec a = (load(x + j, n) - q.level_x) * q.scale_x;
      const Vec v = a - (load(y + j, n) - q.level_y) * q.scale_y;
      const Vec slope = -4 * (d[0] + 2 * a * d[1] - v * d[2]);
      totals[0] += slope;
      totals[1] += slope * a;
      store(gradient + j, slope * (q.scale_x * factor), n);
    }
    for (int i = 0; i < 2; i++) into[i] += sum(totals[i]);
  }

  // `into`: sums over the map of 1 - SSIM, slope, slope times x'.
  template <bool GRADIENT>
  void map(const Affine &q, Int m, const Maps &x, const Maps &y, const Maps &gradient,
           double *into) {
    const Int after = rows.taps - 1 - rows.before;
    Int result = 0, done = 0;
    into[0] = into[1] = into[2] = 0;
    for (Int r = 0; r < rows.cells; r++) {
      fill(q, x.at(m, r), y.at(m, r));
      across<4>(line.data() + edge - columns.before, step, means.row(r), columns.weights,
                columns.taps, columns.results);
      for (; result < rows.results && (result + after <= r || r == rows.cells - 1); result++) {
        means.turn(result, rows.before, rows.cells, rows.weights, whole(rows.results));
        into[0] += compare<GRADIENT>(q);
        if (!GRADIENT) continue;
        across<3>(slopes.data() + edge - (columns.taps - 1 - columns.before), step,
                  back.row(result), columns.adjoint, columns.taps, columns.cells);
        const bool last = result == rows.results - 1;
        for (; done < rows.cells && (done + rows.before <= result || last); done++) {
          back.turn(done, after, rows.results, rows.adjoint, whole(rows.cells));
          finish(q, x.at(m, done), y.at(m, done), gradient.at(m, done), into + 1);
        }
      }
    }
  }
};

// Maps [first, last). gradient: d sum(1 - SSIM) / dx times factor, or no data; sums: (maps, 3).
extern "C" void ssim(Maps x, Maps y, Maps gradient, Int first, Int last, Axis rows, Axis columns,
                     const Affine *affine, float c1, float c2, float factor, double *sums) {
  Work work(rows, columns, c1, c2, factor);
  for (Int m = first; m < last; m++)
    if (gradient.data)
      work.map<true>(affine[m], m, x, y, gradient, sums + 3 * m);
    else
      work.map<false>(affine[m], m, x, y, gradient, sums + 3 * m);
}
