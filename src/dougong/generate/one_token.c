/* A model's step for the next token of one or a few texts, on a CPU: a list of operations, run by all threads together.
 *
 * At one token a step every weight is read once and little is computed with it: memory sets the pace, if nothing else
 * does. So weights are widened as they come (bf16 by a shift, integers by a conversion), lines that will be needed are
 * asked for early, sums are kept in float, LANES of them side by side, and threads stay together for the whole list.
 * With more texts the arithmetic counts, and what is loaded is used for four of them.
 * program.py makes the list; native.py compiles this file where it runs, and so for the processor it runs on.
 *
 * A matrix of O rows and I columns lies row by row. All vectors are floats; their lengths are multiples of LANES.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROWS 4          /* rows of a matrix multiplied together: they share what is loaded of x */
#define AT_ONCE 64      /* groups whose scales are widened together */
#define AHEAD 4096      /* bytes of a matrix between what is read and what is asked for */
#define UNROLL _Pragma("GCC unroll 4")

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t signed_bytes __attribute__((vector_size(LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

enum kind { FLOAT, BF16, INT8, INT4 };      /* of a matrix, or of keys and values (the first two) */

int64_t lanes(void) { return LANES; }

static inline floats load(const float *p) { floats v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, floats v) { memcpy(p, &v, sizeof v); }
static inline floats all(float x) { return x - (floats){0}; }

/* LANES numbers of a narrow type, widened. GCC takes the portable form of these apart, hence the intrinsics. */
#if LANES == 16
static inline words widen_halves(const uint16_t *p) {
    return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
static inline ints widen_signed(const int8_t *p) {
    return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
static inline ints widen_bytes(const uint8_t *p) {
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
static inline floats to_floats(ints v) { return (floats)_mm512_cvtepi32_ps((__m512i)v); }
#elif LANES == 8
static inline words widen_halves(const uint16_t *p) {
    return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
}
static inline ints widen_signed(const int8_t *p) {
    return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
static inline ints widen_bytes(const uint8_t *p) {
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
static inline floats to_floats(ints v) { return (floats)_mm256_cvtepi32_ps((__m256i)v); }
#else
static inline words widen_halves(const uint16_t *p) {
    halves v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, words);
}
static inline ints widen_signed(const int8_t *p) {
    signed_bytes v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, ints);
}
static inline ints widen_bytes(const uint8_t *p) {
    bytes v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, ints);
}
static inline floats to_floats(ints v) { return __builtin_convertvector(v, floats); }
#endif

/* The two integers of 4 bits in a byte, each stored plus 8. */
#if LANES == 16
static inline floats low_half(ints pair) {
    const floats integers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (floats)_mm512_permutexvar_ps((__m512i)pair, (__m512)integers);    /* it looks at the last four bits alone */
}
static inline floats high_half(ints pair) { return low_half(pair >> 4); }
#else
static inline floats low_half(ints pair) { return to_floats((pair & 15) - 8); }
static inline floats high_half(ints pair) { return to_floats((pair >> 4) - 8); }
#endif

static inline floats load_bf16(const uint16_t *p) {
    words wide = widen_halves(p) << 16;
    floats v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

static inline floats load_as(enum kind kind, const void *p, int64_t at) {
    return kind == FLOAT ? load((const float *)p + at) : load_bf16((const uint16_t *)p + at);
}

/* A float16 as float. */
static inline float half(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(__aarch64__)
    __fp16 v;
    memcpy(&v, &h, sizeof v);
    return v;
#else
    float magnitude = ldexpf((h & 1023) + (h & 0x7c00 ? 1024 : 0), (h & 0x7c00 ? (h >> 10 & 31) : 1) - 25);
    if ((h & 0x7c00) == 0x7c00) magnitude = h & 1023 ? NAN : INFINITY;
    return h & 0x8000 ? -magnitude : magnitude;
#endif
}

static inline void widen_scales(const uint16_t *scale, float *wide, int64_t n) {
    int64_t g = 0;
#if defined(__F16C__)
    for (; g + 8 <= n; g += 8)
        _mm256_storeu_ps(wide + g, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scale + g))));
#endif
    for (; g < n; g++) wide[g] = half(scale[g]);
}

static inline float sum(floats v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

/* e^x to 2e-7 of it, 0 below -87: x = n ln 2 + r, a polynomial of r, n added to the exponent. NaN stays NaN. */
static inline floats exponential(floats x) {
    ints some = ~(x < -87.0f);
    for (int i = 0; i < LANES; i++) x[i] = x[i] < -87.0f ? -87.0f : x[i] > 88.0f ? 88.0f : x[i];
    ints exponent;
    for (int i = 0; i < LANES; i++) exponent[i] = (int32_t)(x[i] * 1.44269504f + (x[i] < 0 ? -0.5f : 0.5f));
    floats n = to_floats(exponent);
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = 1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1665796e-2f + r * (8.3334519e-3f
               + r * 1.3981999e-3f)))));
    ints bits;
    memcpy(&bits, &p, sizeof bits);
    bits = (bits + (exponent << 23)) & some;
    memcpy(&p, &bits, sizeof p);
    return p;
}

/* y[o] = bias[o] + sum over i of w[o, i] x[i] for `rows` rows from o on. Integers have a float16 scale for each group
 * of columns. At 4 bits column 2j is in the low half of byte j, and x has been through `sorted`. */
static inline __attribute__((always_inline)) void few_rows(
        enum kind kind, const float *x, const void *matrix, const uint16_t *scale, const float *bias, float *y,
        int64_t o, int64_t I, int64_t group, int rows) {
    floats total[ROWS] = {0};
    if (kind == FLOAT || kind == BF16) {
        for (int64_t i = 0; i < I; i += LANES) {
            floats x_i = load(x + i);
            UNROLL for (int r = 0; r < rows; r++) {
                int64_t at = (o + r) * I + i;
                if (i % (kind == FLOAT ? 16 : 32) == 0)
                    __builtin_prefetch((const char *)matrix + at * (kind == FLOAT ? 4 : 2) + AHEAD);
                total[r] += x_i * load_as(kind, matrix, at);
            }
        }
    } else {
        int64_t groups = I / group;
        for (int64_t first = 0; first < groups; first += AT_ONCE) {
            int64_t last = first + AT_ONCE < groups ? first + AT_ONCE : groups;
            float wide[ROWS][AT_ONCE];
            for (int r = 0; r < rows; r++) widen_scales(scale + (o + r) * groups + first, wide[r], last - first);
            for (int64_t g = first; g < last; g++) {
                floats part[ROWS] = {0};
                if (kind == INT8) {
                    UNROLL for (int64_t i = g * group; i < (g + 1) * group; i += LANES) {
                        floats x_i = load(x + i);
                        UNROLL for (int r = 0; r < rows; r++) {
                            const int8_t *at = (const int8_t *)matrix + (o + r) * I + i;
                            if (i % 64 == 0) __builtin_prefetch(at + AHEAD);
                            part[r] += x_i * to_floats(widen_signed(at));
                        }
                    }
                } else {
                    UNROLL for (int64_t i = g * group; i < (g + 1) * group; i += 2 * LANES) {
                        floats even = load(x + i), odd = load(x + i + LANES);
                        UNROLL for (int r = 0; r < rows; r++) {
                            const uint8_t *at = (const uint8_t *)matrix + ((o + r) * I + i) / 2;
                            if (i % 128 == 0) __builtin_prefetch(at + AHEAD);
                            ints pair = widen_bytes(at);
                            part[r] += even * low_half(pair) + odd * high_half(pair);
                        }
                    }
                }
                UNROLL for (int r = 0; r < rows; r++) total[r] += part[r] * wide[r][g - first];
            }
        }
    }
    for (int r = 0; r < rows; r++) y[o + r] = sum(total[r]) + (bias ? bias[o + r] : 0);
}

/* A thread's share of `n` things, in units: from *begin to *end. */
static inline void share(int64_t n, int64_t unit, int thread, int threads, int64_t *begin, int64_t *end) {
    int64_t units = (n + unit - 1) / unit;
    *begin = units * thread / threads * unit;
    *end = units * (thread + 1) / threads * unit;
    if (*end > n) *end = n;
}

/* What `few_rows` computes, of plain floats and for `texts` vectors x, at most 4: they lie `x_step` apart, their
 * results `y_step`. Asks meanwhile for what comes next in memory, `bytes` for each LANES columns. */
static inline __attribute__((always_inline)) void few_rows_of_texts(
        const float *x, const float *matrix, const float *bias, float *y, int64_t I, int64_t x_step, int64_t y_step,
        int rows, int texts, const char *next, int bytes) {
    floats total[ROWS][4] = {{{0}}};
    for (int64_t i = 0; i < I; i += LANES) {
        floats x_i[4];
        if (next)
            for (int at = 0; at < bytes; at += 64) __builtin_prefetch(next + i / LANES * bytes + at);
        UNROLL for (int t = 0; t < texts; t++) x_i[t] = load(x + t * x_step + i);
        UNROLL for (int r = 0; r < rows; r++) {
            floats w = load(matrix + r * I + i);
            UNROLL for (int t = 0; t < texts; t++) total[r][t] += w * x_i[t];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < texts; t++) y[t * y_step + r] = sum(total[r][t]) + (bias ? bias[r] : 0);
}

static inline __attribute__((always_inline)) void rows_of_texts(
        const float *x, const float *matrix, const float *bias, float *y, int64_t I, int64_t x_step, int64_t y_step,
        int rows, int64_t texts, const char *next, int bytes) {
    if (texts >= 4) few_rows_of_texts(x, matrix, bias, y, I, x_step, y_step, rows, 4, next, bytes);
    int64_t t = texts >= 4 ? 4 : 0;
    for (; t + 4 <= texts; t += 4)
        few_rows_of_texts(x + t * x_step, matrix, bias, y + t * y_step, I, x_step, y_step, rows, 4, 0, 0);
    for (; t + 2 <= texts; t += 2)
        few_rows_of_texts(x + t * x_step, matrix, bias, y + t * y_step, I, x_step, y_step, rows, 2, 0, 0);
    if (t < texts) few_rows_of_texts(x + t * x_step, matrix, bias, y + t * y_step, I, x_step, y_step, rows, 1, 0, 0);
}

/* `rows` rows of a matrix as floats. */
static inline __attribute__((always_inline)) void widen_rows(
        enum kind kind, const void *matrix, const uint16_t *scale, float *wide, int64_t o, int64_t I, int64_t group,
        int rows) {
    for (int r = 0; r < rows; r++, wide += I) {
        int64_t at = (o + r) * I;
        if (kind == BF16) {
            for (int64_t i = 0; i < I; i += LANES) {
                if (i % 32 == 0) __builtin_prefetch((const uint16_t *)matrix + at + i + AHEAD / 2);
                store(wide + i, load_bf16((const uint16_t *)matrix + at + i));
            }
            continue;
        }
        for (int64_t g = 0; g < I / group; g++) {
            float by = half(scale[(o + r) * (I / group) + g]);
            if (kind == INT8)
                for (int64_t i = g * group; i < (g + 1) * group; i += LANES) {
                    const int8_t *from = (const int8_t *)matrix + at + i;
                    if (i % 64 == 0) __builtin_prefetch(from + AHEAD);
                    store(wide + i, to_floats(widen_signed(from)) * by);
                }
            else
                for (int64_t i = g * group; i < (g + 1) * group; i += 2 * LANES) {
                    const uint8_t *from = (const uint8_t *)matrix + (at + i) / 2;
                    if (i % 128 == 0) __builtin_prefetch(from + AHEAD);
                    ints pair = widen_bytes(from);
                    store(wide + i, low_half(pair) * by);
                    store(wide + i + LANES, high_half(pair) * by);
                }
        }
    }
}

static inline __attribute__((always_inline)) void product(
        enum kind kind, const float *x, const void *matrix, const uint16_t *scale, const float *bias, float *y,
        int64_t O, int64_t I, int64_t group, int64_t x_step, int64_t y_step, int64_t texts, int thread, int threads) {
    int64_t o, end;
    share(O, ROWS, thread, threads, &o, &end);
    if (texts == 1) {
        for (; o + ROWS <= end; o += ROWS) {
            if (group == 32) few_rows(kind, x, matrix, scale, bias, y, o, I, 32, ROWS);
            else few_rows(kind, x, matrix, scale, bias, y, o, I, group, ROWS);
        }
        for (; o < end; o++) few_rows(kind, x, matrix, scale, bias, y, o, I, group, 1);
        return;
    }
    float *wide = kind == FLOAT ? 0 : malloc(ROWS * I * sizeof *wide);
    if (kind != FLOAT && !wide) { y[0] = NAN; return; }
    for (; o < end; o += ROWS) {
        int rows = end - o < ROWS ? end - o : ROWS;
        const float *from = kind == FLOAT ? (const float *)matrix + o * I : wide, *b = bias ? bias + o : 0;
        if (kind != FLOAT && group == 32) widen_rows(kind, matrix, scale, wide, o, I, 32, rows);
        else if (kind != FLOAT) widen_rows(kind, matrix, scale, wide, o, I, group, rows);
        int bits = kind == FLOAT ? 32 : kind == BF16 ? 16 : kind == INT8 ? 8 : 4, ahead = ROWS * LANES * bits / 8;
        const char *next = (const char *)matrix + (o + ROWS) * I * bits / 8;
        if (rows == ROWS) rows_of_texts(x, from, b, y + o, I, x_step, y_step, ROWS, texts, next, ahead);
        else for (int r = 0; r < rows; r++)
            rows_of_texts(x, from + r * I, b ? b + r : 0, y + o + r, I, x_step, y_step, 1, texts, 0, 0);
    }
    free(wide);
}

/* Of each 2 LANES numbers the even ones, then the odd ones: as the integers of 4 bits lie in their bytes. */
static void sorted(const float *x, float *y, int64_t I) {
    for (int64_t i = 0; i < I; i += 2 * LANES)
        for (int j = 0; j < LANES; j++) {
            y[i + j] = x[i + 2 * j];
            y[i + LANES + j] = x[i + 2 * j + 1];
        }
}

/* x / sqrt(mean x² + eps) · weight; weight may be null. */
static void rms_norm(const float *x, const float *weight, float *y, int64_t I, float eps) {
    floats squares = {0};
    for (int64_t i = 0; i < I; i += LANES) squares += load(x + i) * load(x + i);
    float by = 1 / sqrtf(sum(squares) / I + eps);
    for (int64_t i = 0; i < I; i += LANES) store(y + i, load(x + i) * by * (weight ? load(weight + i) : all(1)));
}

/* (x - mean) / sqrt(variance + eps) · weight + bias; both may be null. */
static void layer_norm(const float *x, const float *weight, const float *bias, float *y, int64_t I, float eps) {
    floats total = {0}, squares = {0};
    for (int64_t i = 0; i < I; i += LANES) total += load(x + i);
    float mean = sum(total) / I;
    for (int64_t i = 0; i < I; i += LANES) { floats d = load(x + i) - mean; squares += d * d; }
    float by = 1 / sqrtf(sum(squares) / I + eps);
    for (int64_t i = 0; i < I; i += LANES) {
        floats scaled = (load(x + i) - mean) * by * (weight ? load(weight + i) : all(1));
        store(y + i, scaled + (bias ? load(bias + i) : all(0)));
    }
}

/* A head in place: x · cos + (x with its halves exchanged) · sin. H a multiple of 2 LANES. */
static void turn(float *x, const float *cos, const float *sin, int64_t H) {
    for (int64_t i = 0; i < H / 2; i += LANES) {
        floats a = load(x + i), b = load(x + H / 2 + i);
        store(x + i, a * load(cos + i) + b * load(sin + i));
        store(x + H / 2 + i, b * load(cos + H / 2 + i) + a * load(sin + H / 2 + i));
    }
}

/* softmax(q k / sqrt(H) - slope · distance) v for one head over columns begin to end of its keys and values. */
static inline __attribute__((always_inline)) void attend(
        enum kind kind, const float *q, const void *keys, const void *values, float slope, float *y, int64_t H,
        int64_t begin, int64_t end) {
    int64_t S = end - begin, room = (S + LANES - 1) / LANES * LANES;
    float *score = malloc(room * sizeof *score), largest = -INFINITY, root = 1 / sqrtf(H);
    if (!score) { y[0] = NAN; return; }      /* which the caller finds in the logits */
    for (int64_t s = 0; s < S; s++) {
        floats part = {0};
        for (int64_t i = 0; i < H; i += LANES) part += load(q + i) * load_as(kind, keys, (begin + s) * H + i);
        score[s] = sum(part) * root - slope * (S - 1 - s);
        largest = score[s] > largest ? score[s] : largest;
    }
    for (int64_t s = S; s < room; s++) score[s] = -INFINITY;
    floats total = {0};
    for (int64_t s = 0; s < room; s += LANES) {
        floats weight = exponential(load(score + s) - largest);
        store(score + s, weight);
        total += weight;
    }
    float by = 1 / sum(total);
    for (int64_t i = 0; i < H; i += 4 * LANES) {
        int wide = H - i < 4 * LANES ? (H - i) / LANES : 4;
        floats mixed[4] = {0};
        for (int64_t s = 0; s < S; s++)
            UNROLL for (int j = 0; j < wide; j++)
                mixed[j] += score[s] * load_as(kind, values, (begin + s) * H + i + j * LANES);
        for (int j = 0; j < wide; j++) store(y + i + j * LANES, mixed[j] * by);
    }
    free(score);
}

static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;      /* to the nearest, ties to even */
}

static void append(enum kind kind, const float *x, void *cache, int64_t at, int64_t H) {
    if (kind == FLOAT) memcpy((float *)cache + at, x, H * sizeof *x);
    else for (int64_t i = 0; i < H; i++) ((uint16_t *)cache + at)[i] = to_bf16(x[i]);
}

enum action { PRODUCT, SORTED, RMS_NORM, LAYER_NORM, HEADS, APPEND, ATTEND, ADD, MIX, GATE, GELU, GELU_TANH, RELU2 };

/* What an operation reads (a to d), where it writes, and its numbers. A vector of the next text lies `step` further on:
 * of a, of b, of y. `together`: the next operation need not wait for this one. */
struct operation {
    int64_t action, kind;
    const void *a, *b, *c, *d;
    void *y;
    int64_t n[6], step[3];
    double real;
    int64_t together;
};

/* Where a text's new token stands: the columns of the cache that hold the text, the token's own the last; how many
 * columns the cache has; the token's angles. */
struct place {
    int64_t begin, end, width;
    const float *cos, *sin;
};

/* A thread's share of one operation. */
static void act(const struct operation *op, const struct place *places, int64_t texts, int thread, int threads) {
    const void *b = op->b, *c = op->c;
    const float *a = op->a;
    const int64_t *n = op->n, *step = op->step;
    float *y = op->y;
    int64_t i, end;
    switch ((enum action)op->action) {
    case PRODUCT:      /* x, matrix, scale, bias; O, I, group */
        switch ((enum kind)op->kind) {
        case FLOAT: product(FLOAT, a, b, 0, op->d, y, n[0], n[1], 32, step[0], step[2], texts, thread, threads); break;
        case BF16: product(BF16, a, b, 0, op->d, y, n[0], n[1], 32, step[0], step[2], texts, thread, threads); break;
        case INT8: product(INT8, a, b, c, op->d, y, n[0], n[1], n[2], step[0], step[2], texts, thread, threads); break;
        case INT4: product(INT4, a, b, c, op->d, y, n[0], n[1], n[2], step[0], step[2], texts, thread, threads); break;
        }
        break;
    case SORTED: case RMS_NORM: case LAYER_NORM:      /* x, weight, bias; I */
        share(texts, 1, thread, threads, &i, &end);
        for (; i < end; i++) {
            const float *x = a + i * step[0];
            float *to = y + i * step[2];
            if (op->action == SORTED) sorted(x, to, n[0]);
            else if (op->action == RMS_NORM) rms_norm(x, b, to, n[0], op->real);
            else layer_norm(x, b, c, to, n[0], op->real);
        }
        break;
    case HEADS:        /* -, queries' weight, keys' weight; heads of queries, of keys, H, normalised?, turned? */
        share(texts * (n[0] + n[1]), 1, thread, threads, &i, &end);
        for (; i < end; i++) {
            int64_t text = i / (n[0] + n[1]), head = i % (n[0] + n[1]);
            float *x = y + text * step[2] + head * n[2];
            if (n[3]) rms_norm(x, head < n[0] ? b : c, x, n[2], op->real);
            if (n[4]) turn(x, places[text].cos, places[text].sin, n[2]);
        }
        break;
    case APPEND:       /* keys and values after one another, each text's cache of keys, of values; K, H */
        share(texts * n[0], 1, thread, threads, &i, &end);
        for (; i < end; i++) {
            int64_t text = i / n[0], head = i % n[0], at = (head * places[text].width + places[text].end - 1) * n[1];
            const float *x = a + text * step[0] + head * n[1];
            append(op->kind, x, ((void *const *)b)[text], at, n[1]);
            append(op->kind, x + n[0] * n[1], ((void *const *)c)[text], at, n[1]);
        }
        break;
    case ATTEND:       /* queries, each text's cache of keys, of values, slopes; N, K, H, window */
        share(texts * n[0], 1, thread, threads, &i, &end);
        for (; i < end; i++) {
            int64_t text = i / n[0], head = i % n[0], H = n[2];
            const struct place *place = places + text;
            int64_t at = head / (n[0] / n[1]) * place->width * H * (op->kind == FLOAT ? 4 : 2), begin = place->begin;
            const char *keys = ((const char *const *)b)[text] + at, *values = ((const char *const *)c)[text] + at;
            const float *q = a + text * step[0] + head * H;
            float *to = y + text * step[2] + head * H, slope = op->d ? ((const float *)op->d)[head] : 0;
            if (n[3] && place->end - n[3] > begin) begin = place->end - n[3];
            if (op->kind == FLOAT) attend(FLOAT, q, keys, values, slope, to, H, begin, place->end);
            else attend(BF16, q, keys, values, slope, to, H, begin, place->end);
        }
        break;
    default:           /* number by number; I */
        share(texts * n[0], LANES, thread, threads, &i, &end);
        for (; i < end; i += LANES) {
            int64_t text = i / n[0], at = i % n[0];
            floats x = load(a + text * step[0] + at), result = {0};
            const float *other = (const float *)b + text * step[1] + at;
            switch ((enum action)op->action) {
            case ADD: result = x + load(other); break;
            case MIX: result = x * ((const float *)c)[0] + load(other) * ((const float *)op->d)[0]; break;
            case GATE: result = x / (1.0f + exponential(-x)) * load(other); break;
            case RELU2: for (int j = 0; j < LANES; j++) result[j] = x[j] < 0 ? 0 : x[j] * x[j]; break;
            case GELU_TANH: result = x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x))); break;
            default: for (int j = 0; j < LANES; j++) result[j] = 0.5f * x[j] * (1 + erff(x[j] * 0.70710678f));
            }
            store(y + text * step[2] + at, result);
        }
    }
}

void run(const struct operation *operations, int64_t count, const struct place *places, int64_t texts, int threads) {
    #pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), team = omp_get_num_threads();
        for (int64_t i = 0; i < count; i++) {
            act(operations + i, places, texts, thread, team);
            if (!operations[i].together) {
                #pragma omp barrier
            }
        }
    }
}
