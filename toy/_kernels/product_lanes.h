/* The matrix product for one width of vector: product.h includes this once for each, after it has said
 *
 * TOY_PRODUCT(name)     the name of a function or type for this width
 * TOY_PRODUCT_TARGET    the instruction sets that these functions may use, whatever the rest is compiled for
 * TOY_PRODUCT_LANES     numbers in a vector
 * TOY_PRODUCT_ROWS      rows of a tile: its sums, two vectors a row, leave registers for two vectors of b and a number of a
 * TOY_PRODUCT_UNROLL    steps of the innermost loop that are written out
 * TOY_PRODUCT_AHEAD     steps before they are needed the numbers of b are asked for; 0: the processor looks ahead well enough
 *
 * The way is that of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008), with
 * the tile written by the compiler instead of by hand as in BLIS (Van Zee and van de Geijn, ACM TOMS 41(3), 2015). Some
 * columns of b are packed into panels two vectors wide, which stay in the second cache; the rows of a that make a tile are
 * copied together into the first one, and the panels go past them. The last panel of some columns is one vector wide where
 * that is enough, and filled up; of its tiles only what belongs to c is written.
 *
 * Every element of c is the sum of chains of fused multiply-adds over at most TOY_DEPTH terms, in order; where the chains
 * begin follows from k alone. So it has the same bits in whatever tile, slice or panel it is computed.
 */

#define TOY_PANEL (2 * TOY_PRODUCT_LANES)
#define toy_vector TOY_PRODUCT(vector)
#define toy_vector_anywhere TOY_PRODUCT(vector_anywhere)
#define TOY_LOAD(x) ((toy_vector)*(const toy_vector_anywhere *)(x))
#define TOY_PRODUCT_INLINE TOY_PRODUCT_TARGET TOY_INLINE

typedef float toy_vector __attribute__((vector_size(4 * TOY_PRODUCT_LANES)));
typedef float toy_vector_anywhere __attribute__((vector_size(4 * TOY_PRODUCT_LANES), aligned(4), may_alias));

/* ---- tiles ------------------------------------------------------------------------------------------------------------ */

/* steps, in numbers, in the copy of the rows of a: (rows, depth), or (depth, rows) if a is transposed */
#define TOY_ROW (TOY_DEPTH + 16)
#define TOY_STEP (TOY_PRODUCT_LANES)

/* c (rows, vectors) = a (rows, n) b (n, vectors), or with `add` that much more. The constants make the compiler unroll this
 * and keep the sums in registers. */
TOY_PRODUCT_INLINE void TOY_PRODUCT(tile)(const int rows, const int vectors, const int is_transposed, ptrdiff_t n,
                                          const float *a, const float *b, ptrdiff_t b_row, float *c, ptrdiff_t c_row,
                                          int add) {
    const ptrdiff_t a_row = is_transposed ? 1 : TOY_ROW, a_step = is_transposed ? TOY_STEP : 1;
    toy_vector sums[TOY_PRODUCT_ROWS][2];
    TOY_UNROLL_ALL
    for (int i = 0; i < rows; i++)
        TOY_UNROLL_ALL
        for (int j = 0; j < vectors; j++) {
            sums[i][j] = (toy_vector){0};
            __builtin_prefetch(c + i * c_row + j * TOY_PRODUCT_LANES, 1, 3);
        }
    TOY_UNROLL(TOY_PRODUCT_UNROLL)
    for (ptrdiff_t k = 0; k < n; k++, a += a_step, b += b_row) {
        const toy_vector left = TOY_LOAD(b), right = vectors == 2 ? TOY_LOAD(b + TOY_PRODUCT_LANES) : left;
        if (TOY_PRODUCT_AHEAD) {
            __builtin_prefetch(b + TOY_PRODUCT_AHEAD * b_row, 0, 3);
            if (vectors == 2) __builtin_prefetch(b + TOY_PRODUCT_AHEAD * b_row + TOY_PRODUCT_LANES, 0, 3);
        }
        TOY_UNROLL_ALL
        for (int i = 0; i < rows; i++) {
            const float number = a[i * a_row];
            sums[i][0] += number * left;
            if (vectors == 2) sums[i][1] += number * right;
        }
    }
    TOY_UNROLL_ALL
    for (int i = 0; i < rows; i++)
        TOY_UNROLL_ALL
        for (int j = 0; j < vectors; j++) {
            float *place = c + i * c_row + j * TOY_PRODUCT_LANES;
            *(toy_vector_anywhere *)place = add ? TOY_LOAD(place) + sums[i][j] : sums[i][j];
        }
}

typedef void TOY_PRODUCT(tile_of)(ptrdiff_t n, const float *a, const float *b, ptrdiff_t b_row, float *c, ptrdiff_t c_row,
                                  int add);

#define TOY_TILE_OF(ROWS, VECTORS, TRANSPOSED) \
    TOY_PRODUCT_TARGET static void TOY_PRODUCT(tile_##ROWS##_##VECTORS##_##TRANSPOSED)( \
        ptrdiff_t n, const float *a, const float *b, ptrdiff_t b_row, float *c, ptrdiff_t c_row, int add) { \
        TOY_PRODUCT(tile)(ROWS, VECTORS, TRANSPOSED, n, a, b, b_row, c, c_row, add); \
    }
#define TOY_TILES_OF(ROWS) \
    TOY_TILE_OF(ROWS, 1, 0) TOY_TILE_OF(ROWS, 2, 0) TOY_TILE_OF(ROWS, 1, 1) TOY_TILE_OF(ROWS, 2, 1)
#define TOY_NAMES_UP_TO_6(V, T) \
    TOY_PRODUCT(tile_1_##V##_##T), TOY_PRODUCT(tile_2_##V##_##T), TOY_PRODUCT(tile_3_##V##_##T), \
    TOY_PRODUCT(tile_4_##V##_##T), TOY_PRODUCT(tile_5_##V##_##T), TOY_PRODUCT(tile_6_##V##_##T)
TOY_TILES_OF(1) TOY_TILES_OF(2) TOY_TILES_OF(3) TOY_TILES_OF(4) TOY_TILES_OF(5) TOY_TILES_OF(6)
#if TOY_PRODUCT_ROWS == 14
TOY_TILES_OF(7) TOY_TILES_OF(8) TOY_TILES_OF(9) TOY_TILES_OF(10) TOY_TILES_OF(11) TOY_TILES_OF(12) TOY_TILES_OF(13)
TOY_TILES_OF(14)
#define TOY_NAMES(V, T) \
    TOY_NAMES_UP_TO_6(V, T), TOY_PRODUCT(tile_7_##V##_##T), TOY_PRODUCT(tile_8_##V##_##T), TOY_PRODUCT(tile_9_##V##_##T), \
    TOY_PRODUCT(tile_10_##V##_##T), TOY_PRODUCT(tile_11_##V##_##T), TOY_PRODUCT(tile_12_##V##_##T), \
    TOY_PRODUCT(tile_13_##V##_##T), TOY_PRODUCT(tile_14_##V##_##T)
#else
#define TOY_NAMES TOY_NAMES_UP_TO_6
#endif
/* [whether a is transposed][vectors - 1][rows - 1] */
static TOY_PRODUCT(tile_of) *const TOY_PRODUCT(tiles)[2][2][TOY_PRODUCT_ROWS] = {
    {{TOY_NAMES(1, 0)}, {TOY_NAMES(2, 0)}}, {{TOY_NAMES(1, 1)}, {TOY_NAMES(2, 1)}}};

/* ---- packing ---------------------------------------------------------------------------------------------------------- */

#if TOY_PRODUCT_LANES == 16
#define TOY_MIX_OF(NAME, x, y) ((toy_vector)_mm512_##NAME##_ps((__m512)(x), (__m512)(y)))
#define TOY_HALVES_OF(x, y, which) ((toy_vector)_mm512_shuffle_ps((__m512)(x), (__m512)(y), which))
#else
#define TOY_MIX_OF(NAME, x, y) ((toy_vector)_mm256_##NAME##_ps((__m256)(x), (__m256)(y)))
#define TOY_HALVES_OF(x, y, which) ((toy_vector)_mm256_shuffle_ps((__m256)(x), (__m256)(y), which))
#endif

/* four numbers, from place k on, of each of the rows x[0], x[4], x[8], ... */
TOY_PRODUCT_INLINE toy_vector TOY_PRODUCT(join_rows)(const float *const *x, ptrdiff_t k) {
#if TOY_PRODUCT_LANES == 16
    __m512 all = _mm512_castps128_ps512(_mm_loadu_ps(x[0] + k));
    all = _mm512_insertf32x4(all, _mm_loadu_ps(x[4] + k), 1);
    all = _mm512_insertf32x4(all, _mm_loadu_ps(x[8] + k), 2);
    return (toy_vector)_mm512_insertf32x4(all, _mm_loadu_ps(x[12] + k), 3);
#else
    return (toy_vector)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x[0] + k)), _mm_loadu_ps(x[4] + k), 1);
#endif
}

/* b (columns, n) -> panel (n, width) with columns <= width; the columns of the panel after the last one repeat it */
TOY_PRODUCT_TARGET static void TOY_PRODUCT(pack_transposed)(ptrdiff_t columns, ptrdiff_t width, ptrdiff_t n, const float *b,
                                                            ptrdiff_t b_row, float *panel) {
    for (ptrdiff_t first = 0; first < width; first += TOY_PRODUCT_LANES, panel += TOY_PRODUCT_LANES) {
        const float *x[TOY_PRODUCT_LANES];
        for (ptrdiff_t i = 0; i < TOY_PRODUCT_LANES; i++)
            x[i] = b + (first + i < columns ? first + i : columns - 1) * b_row;
        ptrdiff_t k = 0;
        for (; k + 4 <= n; k += 4) { /* the 4 x 4 matrices that then stand side by side in four vectors are transposed */
            const toy_vector r = TOY_PRODUCT(join_rows)(x, k), s = TOY_PRODUCT(join_rows)(x + 1, k);
            const toy_vector t = TOY_PRODUCT(join_rows)(x + 2, k), u = TOY_PRODUCT(join_rows)(x + 3, k);
            const toy_vector rs = TOY_MIX_OF(unpacklo, r, s), tu = TOY_MIX_OF(unpacklo, t, u);
            const toy_vector rs_ = TOY_MIX_OF(unpackhi, r, s), tu_ = TOY_MIX_OF(unpackhi, t, u);
            *(toy_vector *)(panel + k * width) = TOY_HALVES_OF(rs, tu, 0x44);
            *(toy_vector *)(panel + (k + 1) * width) = TOY_HALVES_OF(rs, tu, 0xee);
            *(toy_vector *)(panel + (k + 2) * width) = TOY_HALVES_OF(rs_, tu_, 0x44);
            *(toy_vector *)(panel + (k + 3) * width) = TOY_HALVES_OF(rs_, tu_, 0xee);
        }
        for (; k < n; k++)
            for (ptrdiff_t i = 0; i < TOY_PRODUCT_LANES; i++) panel[k * width + i] = x[i][k];
    }
}

/* b (n, columns) -> panel (n, width) with columns <= width; zeros after the last column */
TOY_PRODUCT_TARGET static void TOY_PRODUCT(pack)(ptrdiff_t columns, ptrdiff_t width, ptrdiff_t n, const float *b,
                                                 ptrdiff_t b_row, float *panel) {
    for (ptrdiff_t k = 0; k < n; k++, b += b_row, panel += width) {
        if (columns == TOY_PANEL) {
            __builtin_prefetch(b + 8 * b_row, 0, 3);
            __builtin_prefetch(b + 8 * b_row + TOY_PANEL - 1, 0, 3);
            const toy_vector left = TOY_LOAD(b), right = TOY_LOAD(b + TOY_PRODUCT_LANES);
            *(toy_vector *)panel = left;
            *(toy_vector *)(panel + TOY_PRODUCT_LANES) = right;
        } else {
            memcpy(panel, b, columns * sizeof(float));
            memset(panel + columns, 0, (width - columns) * sizeof(float));
        }
    }
}

/* The rows of a that make a tile -> copy, in steps of TOY_ROW; of the transposed a (n, rows) in steps of TOY_STEP.
 * There, `readable` is how many numbers there are in a row of a. */
TOY_PRODUCT_TARGET static void TOY_PRODUCT(copy_rows)(int is_transposed, ptrdiff_t rows, ptrdiff_t readable, ptrdiff_t n,
                                                      const float *a, ptrdiff_t a_row, float *copy) {
    if (!is_transposed)
        for (ptrdiff_t i = 0; i < rows; i++, a += a_row, copy += TOY_ROW) {
            ptrdiff_t k = 0;
            for (; k + TOY_PRODUCT_LANES <= n; k += TOY_PRODUCT_LANES) *(toy_vector_anywhere *)(copy + k) = TOY_LOAD(a + k);
            for (; k < n; k++) copy[k] = a[k];
        }
    else if (readable >= TOY_STEP)
        for (ptrdiff_t k = 0; k < n; k++, a += a_row, copy += TOY_STEP) {
            __builtin_prefetch(a + 12 * a_row, 0, 3);
            __builtin_prefetch(a + 12 * a_row + TOY_STEP - 1, 0, 3);
            *(toy_vector *)copy = TOY_LOAD(a);
        }
    else
        for (ptrdiff_t k = 0; k < n; k++, a += a_row, copy += TOY_STEP)
            for (ptrdiff_t i = 0; i < rows; i++) copy[i] = a[i];
}

/* ---- the product ------------------------------------------------------------------------------------------------------ */

/* The rows of a, n numbers each, times the panels into those columns of c, or with `add` that much more. Where b is given
 * whole panels are read in it. */
TOY_PRODUCT_TARGET static void TOY_PRODUCT(rows_by_panels)(int is_transposed, ptrdiff_t m, ptrdiff_t columns, ptrdiff_t n,
                                                           const float *a, ptrdiff_t a_row, const float *panels,
                                                           const float *b, ptrdiff_t b_row, int add, float *c,
                                                           ptrdiff_t c_row) {
    _Alignas(64) float copy[TOY_PRODUCT_ROWS * TOY_ROW > TOY_DEPTH * TOY_STEP ? TOY_PRODUCT_ROWS * TOY_ROW
                                                                                      : TOY_DEPTH * TOY_STEP];
    _Alignas(64) float part[TOY_PRODUCT_ROWS * TOY_PANEL];
    for (ptrdiff_t row = 0, rows; row < m; row += rows) {
        /* the last rows in two tiles of about the same height, not in one that is full and one that is nearly empty */
        const ptrdiff_t left = m - row;
        rows = left >= 2 * TOY_PRODUCT_ROWS ? TOY_PRODUCT_ROWS : left > TOY_PRODUCT_ROWS ? (left + 1) / 2 : left;
        TOY_PRODUCT(copy_rows)(is_transposed, rows, left, n, is_transposed ? a + row : a + row * a_row, a_row, copy);
        const float *panel = panels;
        for (ptrdiff_t column = 0, width; column < columns; column += width, panel += n * width) {
            const ptrdiff_t here = columns - column < TOY_PANEL ? columns - column : TOY_PANEL;
            width = here > TOY_PRODUCT_LANES ? TOY_PANEL : TOY_PRODUCT_LANES;
            TOY_PRODUCT(tile_of) *tile = TOY_PRODUCT(tiles)[is_transposed][width == TOY_PANEL][rows - 1];
            float *place = c + row * c_row + column;
            if (here == width) {
                if (b != NULL) tile(n, copy, b + column, b_row, place, c_row, add);
                else tile(n, copy, panel, width, place, c_row, add);
                continue;
            }
            tile(n, copy, panel, width, part, width, 0);
            for (ptrdiff_t i = 0; i < rows; i++)
                for (ptrdiff_t j = 0; j < here; j++)
                    place[i * c_row + j] = add ? place[i * c_row + j] + part[i * width + j] : part[i * width + j];
        }
    }
}

/* c (m, n) = a (m, k) b (k, n), or with `add` that much more; a or b may lie in memory transposed. Steps from row to row in
 * numbers. There is room in `panels`, on a cache line, for TOY_DEPTH rows of `room` columns, whole panels. */
TOY_PRODUCT_TARGET static void TOY_PRODUCT(multiply)(int a_is_transposed, int b_is_transposed, ptrdiff_t m, ptrdiff_t n,
                                                     ptrdiff_t k, const float *a, ptrdiff_t a_row, const float *b,
                                                     ptrdiff_t b_row, int add, float *c, ptrdiff_t c_row, float *panels,
                                                     ptrdiff_t room) {
    /* parts of about the same size, not some full ones and a nearly empty one */
    const ptrdiff_t bands = (n + room - 1) / room, band = ((n + bands - 1) / bands + TOY_PANEL - 1) / TOY_PANEL * TOY_PANEL;
    const ptrdiff_t pieces = (k + TOY_DEPTH - 1) / TOY_DEPTH;
    const ptrdiff_t piece = pieces > 0 ? ((k + pieces - 1) / pieces + 15) / 16 * 16 : 16;
    for (ptrdiff_t column = 0; column < n; column += band) {
        const ptrdiff_t columns = n - column < band ? n - column : band;
        for (ptrdiff_t first = 0; first < k || first == 0; first += piece) {
            const ptrdiff_t depth = k - first < piece ? k - first : piece;
            const float *b_here = b_is_transposed ? b + column * b_row + first : b + first * b_row + column;
            /* if one tile has all rows, each panel is read only once: those of whole vectors can stay where they are */
            const int stays = m <= TOY_PRODUCT_ROWS && !b_is_transposed;
            float *panel = panels;
            for (ptrdiff_t j = 0, width; j < columns; j += width, panel += depth * width) {
                const ptrdiff_t here = columns - j < TOY_PANEL ? columns - j : TOY_PANEL;
                width = here > TOY_PRODUCT_LANES ? TOY_PANEL : TOY_PRODUCT_LANES;
                if (b_is_transposed) TOY_PRODUCT(pack_transposed)(here, width, depth, b_here + j * b_row, b_row, panel);
                else if (!stays || here != width) TOY_PRODUCT(pack)(here, width, depth, b_here + j, b_row, panel);
            }
            const float *a_here = a_is_transposed ? a + first * a_row : a + first;
            TOY_PRODUCT(rows_by_panels)(a_is_transposed, m, columns, depth, a_here, a_row, panels, stays ? b_here : NULL, b_row,
                                        add || first > 0, c + column, c_row);
        }
    }
}

#undef TOY_PANEL
#undef toy_vector
#undef toy_vector_anywhere
#undef TOY_LOAD
#undef TOY_PRODUCT_INLINE
#undef TOY_ROW
#undef TOY_STEP
#undef TOY_TILE_OF
#undef TOY_TILES_OF
#undef TOY_NAMES_UP_TO_6
#undef TOY_NAMES
#undef TOY_MIX_OF
#undef TOY_HALVES_OF
#undef TOY_PRODUCT
#undef TOY_PRODUCT_TARGET
#undef TOY_PRODUCT_LANES
#undef TOY_PRODUCT_ROWS
#undef TOY_PRODUCT_UNROLL
#undef TOY_PRODUCT_AHEAD
