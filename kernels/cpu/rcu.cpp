// Patch cross-attention with importance scoring, forward and backward; what it means: grcsf_fast/reference.py.
//
// One thread takes one patch at a time, copies it into its scratch and does everything there. Tokens lie along the
// vectors' lanes: every product is (rows of numbers, broadcast) x (rows of tokens), and the softmax runs over rows.
// Large patches go in blocks of query tokens, so that no buffer is larger than (tokens, block).

#include "kernels.h"
#include "simd.h"

namespace {

using namespace grcsf;

// Patches in a row that are scored together.
constexpr ptrdiff_t patches_together = 16;

// Sizes that follow from a shape.
struct Sizes {
    explicit Sizes(const RcuShape &of)
        : channels(of.channels), maps(of.maps), residual(of.residual), heads(of.heads), scorer(of.width_of_scorer),
          patch(of.patch), rows(of.planar ? of.patch : of.patch * of.patch), tokens(rows * of.patch),
          queries(of.maps * of.heads * of.residual), down(of.planar ? 1 : of.depth / of.patch),
          across(of.height / of.patch), along(of.width / of.patch), patches(down * across * along),
          pixels(of.depth * of.height * of.width), row(of.width), plane(of.height * of.width), planar(of.planar),
          blocks(rcu_blocks(tokens)), block(blocks.size), tokens_padded(blocks.padded_tokens), image_step(of.image_step),
          map_step(of.map_step) {}

    // First pixel of a patch, and of one of its rows of pixels.
    ptrdiff_t origin(ptrdiff_t number) const {
        const ptrdiff_t x = number % along, y = number / along % across, z = number / along / across;
        return patch * (z * plane + y * row + x);
    }
    ptrdiff_t row_offset(ptrdiff_t i) const { return planar ? i * row : i / patch * plane + i % patch * row; }

    ptrdiff_t channels, maps, residual, heads, scorer, patch, rows, tokens, queries;
    ptrdiff_t down, across, along, patches, pixels, row, plane;
    bool planar;
    RcuBlocks blocks;
    ptrdiff_t block, tokens_padded, image_step, map_step;
};

// One block of a patch's query tokens, as stretches of neighbouring pixels. It does not depend on the patch.
struct Block {
    void lay_out(const Sizes &size, ptrdiff_t number) {
        first = number * size.block;
        count = size.tokens - first < size.block ? size.tokens - first : size.block;
        stretches = 0;
        for (ptrdiff_t done = 0; done < count;) {
            const ptrdiff_t token = first + done, inside = token % size.patch;
            const ptrdiff_t left = size.patch - inside, length = left < count - done ? left : count - done;
            at[stretches] = size.row_offset(token / size.patch) + inside;
            lengths[stretches++] = length;
            done += length;
        }
        common = lengths[0];
        for (int i = 1; i < stretches; ++i)
            if (lengths[i] != common)
                common = 0;
    }
    template <class S, class A> void gather(A *to, const S *from) const {
        each([&](auto length, ptrdiff_t pixel, ptrdiff_t token) { convert_row(to + token, from + pixel, length); });
    }
    template <class S, class A> void scatter(S *to, const A *from) const {
        each([&](auto length, ptrdiff_t pixel, ptrdiff_t token) { convert_row(to + pixel, from + token, length); });
    }
    // Calls `body` for each stretch with its length, first pixel and first token. Lengths of common patches are known when
    // compiling: a loop's prologue, or a call of memcpy, would cost more than the row.
    template <class Body> void each(const Body &body) const {
        switch (common) {
        case 4: return each_of<4>(body);
        case 7: return each_of<7>(body);
        case 8: return each_of<8>(body);
        case 16: return each_of<16>(body);
        }
        ptrdiff_t token = 0;
        for (int i = 0; i < stretches; token += lengths[i++])
            body(lengths[i], at[i], token);
    }
    template <ptrdiff_t length, class Body> void each_of(const Body &body) const {
        for (int i = 0; i < stretches; ++i)
            body(std::integral_constant<ptrdiff_t, length>{}, at[i], i * length);
    }
    ptrdiff_t first, count, common;  // the length of all stretches, or 0
    int stretches;
    ptrdiff_t at[64], lengths[64];
};

// Some query tokens of a block: the first of them, and where their columns lie in the scratch, in rows of `row` numbers.
struct Columns {
    ptrdiff_t first, at, row;
};

struct Blocks {
    explicit Blocks(const Sizes &size) : number(size.blocks.number) {
        all = static_cast<Block *>(std::malloc(size_t(number) * sizeof(Block)));
        if (!all)
            throw std::bad_alloc();
        for (ptrdiff_t i = 0; i < number; ++i)
            all[i].lay_out(size, i);
    }
    ~Blocks() { std::free(all); }
    Blocks(const Blocks &) = delete;
    const Block *begin() const { return all; }
    const Block *end() const { return all + number; }
    ptrdiff_t number;
    Block *all;
};

// A piece of a thread's scratch after another.
template <class A> struct Pieces {
    ptrdiff_t used = 0;
    ptrdiff_t take(ptrdiff_t numbers) {
        const ptrdiff_t first = used;
        // Apart by no multiple of 4096 bytes: loads would wait for stores to the same place of another page.
        used += padded(numbers) + 32;
        return first;
    }
};

template <class A> inline A dot(const A *first, const A *second, ptrdiff_t count) {
    Vector<A> total{};
    ptrdiff_t i = 0;
    for (; i + lanes<A> <= count; i += lanes<A>)
        total += load(first + i) * load(second + i);
    A rest = sum<A>(total);
    for (; i < count; ++i)
        rest += first[i] * second[i];
    return rest;
}

template <class A> inline A row_sum(const A *row, ptrdiff_t count) {
    Vector<A> total{};
    ptrdiff_t i = 0;
    for (; i + lanes<A> <= count; i += lanes<A>)
        total += load(row + i);
    A rest = sum<A>(total);
    for (; i < count; ++i)
        rest += row[i];
    return rest;
}

template <class A> inline void add_scaled(A *to, const A *from, A factor, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; ++i)
        to[i] += factor * from[i];
}

template <class S> struct Rcu {
    using A = typename Accumulate<S>::type;
    using V = Vector<A>;

    // Weights with their types.
    struct Weights {
        explicit Weights(const RcuWeights &of)
            : query(cast(of.query_weight)), query_bias(cast(of.query_bias)), position(cast(of.position_bias)),
              output(cast(of.output_weight)), output_bias(cast(of.output_bias)), score(cast(of.score_weight)),
              context(cast(of.score_context)), score_vector(cast(of.score_vector)), score_bias(cast(of.score_bias)) {}
        static const A *cast(const void *from) { return static_cast<const A *>(from); }
        const A *query, *query_bias, *position, *output, *output_bias, *score, *context, *score_vector, *score_bias;
    };

    // What forward and backward share: a patch in the scratch, its score, its attention.
    struct Patch {
        Patch(const Sizes &size, const Blocks &blocks, Pieces<A> &pieces)
            : size(size), blocks(blocks), x(pieces.take(size.channels * size.block)),
              queries(pieces.take(size.queries * size.block)), logits(pieces.take(size.tokens * size.block)),
              attended(pieces.take(size.queries * size.block)), keys(pieces.take(size.maps * size.residual * size.tokens)),
              values(pieces.take(size.maps * size.residual * size.tokens)), scale(pieces.take(size.block)),
              line(pieces.take(patches_together * size.patch)), means(pieces.take(patches_together * size.channels)),
              hidden(pieces.take(size.scorer)) {}

        // (channels, block) of a block's tokens; padding tokens are 0.
        void gather_block(A *to, const S *from, const Block &block) const {
            for (ptrdiff_t c = 0; c < size.channels; ++c, to += size.block) {
                block.gather(to, from + c * size.pixels);
                for (ptrdiff_t t = block.count; t < size.block; ++t)
                    to[t] = 0;
            }
        }

        // Mean of each channel over each of `count` patches in a row, the first at `from`, as (count, channels). They are
        // read across the patches: memory gives long stretches much faster than a patch's own rows.
        void average(A *scratch, const S *from, ptrdiff_t count) const {
            const ptrdiff_t width = count * size.patch;
            A *sums = scratch + line;
            for (ptrdiff_t c = 0; c < size.channels; ++c, from += size.pixels) {
                std::memset(sums, 0, size_t(width) * sizeof(A));
                for (ptrdiff_t r = 0; r < size.rows; ++r) {
                    const S *row = from + size.row_offset(r);
GRCSF_INDEPENDENT
                    for (ptrdiff_t i = 0; i < width; ++i)
                        sums[i] += widen(row[i]);
                }
                for (ptrdiff_t k = 0; k < count; ++k) {
                    A total = 0;
                    for (ptrdiff_t i = 0; i < size.patch; ++i)
                        total += sums[k * size.patch + i];
                    scratch[means + k * size.channels + c] = total / A(size.tokens);
                }
            }
        }

        // Score of a patch from its mean; leaves the scorer's hidden layer.
        A importance(A *scratch, const A *mean, const Weights &weights, ptrdiff_t image) const {
            A total = 0;
            for (ptrdiff_t i = 0; i < size.scorer; ++i) {
                const A value = dot(weights.score + i * size.channels, mean, size.channels) +
                                weights.context[image * size.scorer + i];
                // Written so that NaN goes through, as in torch.relu.
                scratch[hidden + i] = value < 0 ? A(0) : value;
                total += scratch[hidden + i] * weights.score_vector[i];
            }
            return 1 / (1 + std::exp(-(total + weights.score_bias[0])));
        }

        void gather_maps(A *scratch, const S *key, const S *value) const {
            for (const Block &block : blocks)
                for (ptrdiff_t i = 0; i < size.maps * size.residual; ++i) {
                    const ptrdiff_t from = i / size.residual * size.map_step + i % size.residual * size.pixels;
                    block.gather(scratch + keys + i * size.tokens + block.first, key + from);
                    block.gather(scratch + values + i * size.tokens + block.first, value + from);
                }
        }

        // Queries of some columns from `x`.
        template <int Vectors> void project(A *scratch, const Weights &weights, const Columns &columns) const {
            multiply_columns<A, Vectors, Start::rows>(
                size.queries, size.channels,
                {weights.query, size.channels, 1, scratch + x + columns.first, size.block, scratch + queries + columns.at,
                 columns.row, weights.query_bias, 0});
        }

        // One head and one map of some columns: leaves exp(logits - greatest) in `logits`, 1 / their sums in `scale`, and
        // what was read from the values in `attended`.
        template <int Vectors>
        void attend(
            A *scratch, const Weights &weights, ptrdiff_t map, ptrdiff_t head, const Block &block,
            const Columns &columns) const {
            const ptrdiff_t which = (map * size.heads + head) * size.residual, row = columns.row;
            const ptrdiff_t map_at = map * size.residual * size.tokens;
            A *all = scratch + logits + columns.at, *to = scratch + attended + which * row + columns.at;
            multiply_columns<A, Vectors, Start::matrix>(
                size.tokens, size.residual,
                {scratch + keys + map_at, 1, size.tokens, scratch + queries + which * row + columns.at, row, all, row,
                 weights.position + head * size.tokens * size.tokens_padded + block.first + columns.first,
                 size.tokens_padded});
            V greatest[Vectors], total[Vectors];
#pragma GCC unroll 2
            for (int i = 0; i < Vectors; ++i)
                greatest[i] = broadcast(-std::numeric_limits<A>::infinity()), total[i] = V{};
            for (ptrdiff_t j = 0; j < size.tokens; ++j)
#pragma GCC unroll 2
                for (int i = 0; i < Vectors; ++i) {
                    const V value = load(all + j * row + i * lanes<A>);
                    greatest[i] = greatest[i] < value ? value : greatest[i];
                }
            for (ptrdiff_t j = 0; j < size.tokens; ++j)
#pragma GCC unroll 2
                for (int i = 0; i < Vectors; ++i) {
                    A *at = all + j * row + i * lanes<A>;
                    const V value = exponential(load(at) - greatest[i]);
                    store(at, value);
                    total[i] += value;
                }
            multiply_columns<A, Vectors, Start::zero>(
                size.residual, size.tokens,
                {scratch + values + map_at, size.tokens, 1, all, row, to, row, nullptr, 0});
#pragma GCC unroll 2
            for (int i = 0; i < Vectors; ++i) {
                const V factor = A(1) / total[i];
                store(scratch + scale + columns.at + i * lanes<A>, factor);
                for (ptrdiff_t r = 0; r < size.residual; ++r) {
                    A *at = to + r * row + i * lanes<A>;
                    store<A>(at, load(at) * factor);
                }
            }
        }

        const Sizes &size;
        const Blocks &blocks;
        ptrdiff_t x, queries, logits, attended, keys, values, scale, line, means, hidden;
    };

    static void forward(const RcuForward &call) {
        const Sizes size(call.shape);
        const Weights weights(call.weights);
        const Blocks blocks(size);
        Pieces<A> pieces;
        const Patch patch(size, blocks, pieces);
        const ptrdiff_t update_at = pieces.take(size.channels * size.block);
        const Scratch<A> scratch(pieces.used, call.threads);
        const ptrdiff_t groups = (size.along + patches_together - 1) / patches_together;
        const ptrdiff_t rows = size.down * size.across;
        each_when_free(call.threads, call.shape.batch * rows * groups, [&](ptrdiff_t unit, int thread) {
            const ptrdiff_t row = unit / groups, first = unit % groups * patches_together, left = size.along - first;
            A *mine = scratch.of(thread);
            forward_patches(
                call, patch, weights, mine, mine + update_at, row / rows, row % rows * size.along + first,
                left < patches_together ? left : patches_together);
        });
    }

    // `count` patches in a row.
    static void forward_patches(
        const RcuForward &call, const Patch &patch, const Weights &weights, A *scratch, A *update, ptrdiff_t b,
        ptrdiff_t first, ptrdiff_t count) {
        const Sizes &size = patch.size;
        const ptrdiff_t origin = size.origin(first), map_origin = b * size.image_step + origin;
        const S *x = static_cast<const S *>(call.x) + b * size.channels * size.pixels + origin;
        const S *keys = static_cast<const S *>(call.keys) + map_origin;
        const S *values = static_cast<const S *>(call.values) + map_origin;
        S *out = static_cast<S *>(call.out) + b * size.channels * size.pixels + origin;
        A *scores = static_cast<A *>(call.score) + b * size.patches + first;
        patch.average(scratch, x, count);
        for (ptrdiff_t k = 0; k < count; ++k)
            scores[k] = patch.importance(scratch, scratch + patch.means + k * size.channels, weights, b);
        for (ptrdiff_t k = 0; k < count;) {
            const ptrdiff_t at = k * size.patch;
            ptrdiff_t skipped = 0;
            while (k + skipped < count && is_skipped(call.threshold, scores[k + skipped]))
                ++skipped;
            if (skipped) {
                copy_patches(size, out + at, x + at, skipped);
                k += skipped;
                continue;
            }
            patch.gather_maps(scratch, keys + at, values + at);
            for (const Block &block : patch.blocks) {
                patch.gather_block(scratch + patch.x, x + at, block);
                update_block(patch, weights, scratch, block, scores[k], update);
                for (ptrdiff_t c = 0; c < size.channels; ++c)
                    block.scatter(out + at + c * size.pixels, update + c * size.block);
            }
            ++k;
        }
    }

    static bool is_skipped(double threshold, A score) { return threshold > 0 && !(score >= A(threshold)); }

    static void copy_patches(const Sizes &size, S *to, const S *from, ptrdiff_t count) {
        for (ptrdiff_t c = 0; c < size.channels; ++c)
            for (ptrdiff_t r = 0; r < size.rows; ++r) {
                const ptrdiff_t row = c * size.pixels + size.row_offset(r);
                std::memcpy(to + row, from + row, size_t(count * size.patch) * sizeof(S));
            }
    }

    // (channels, block): x + score * update.
    static void update_block(
        const Patch &patch, const Weights &weights, A *scratch, const Block &block, A score, A *to) {
        const Sizes &size = patch.size;
        // A few columns go all the way, so that what belongs to them stays in the first-level cache; a head's position
        // bias serves all maps while it is there.
        for_columns<A>(size.block, [&](auto vectors, ptrdiff_t n) {
            const Columns columns{n, 0, vectors * lanes<A>};
            patch.template project<vectors>(scratch, weights, columns);
            for (ptrdiff_t head = 0; head < size.heads; ++head)
                for (ptrdiff_t map = 0; map < size.maps; ++map)
                    patch.template attend<vectors>(scratch, weights, map, head, block, columns);
            multiply_columns<A, vectors, Start::rows>(
                size.channels, size.queries,
                {weights.output, size.queries, 1, scratch + patch.attended, columns.row, to + n, size.block,
                 weights.output_bias, 0});
        });
        const A *x = scratch + patch.x;
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < size.channels * size.block; ++i)
            to[i] = x[i] + score * to[i];
    }

    // Gradients of the weights of one part, in the layout of RcuBackward; null where nobody asks.
    struct Sums {
        Sums(const RcuBackward &call, const Sizes &size, ptrdiff_t unit)
            : query(part(call.query_weight_parts, unit, size.queries * padded(size.channels))),
              query_bias(part(call.query_bias_parts, unit, padded(size.queries))),
              position(part(call.position_bias_parts, unit, size.heads * size.tokens * size.tokens_padded)),
              output(part(call.output_weight_parts, unit, size.channels * padded(size.queries))),
              output_bias(part(call.output_bias_parts, unit, padded(size.channels))),
              score(part(call.score_weight_parts, unit, size.scorer * padded(size.channels))),
              context(part(call.score_context_parts, unit, padded(size.scorer))),
              score_vector(part(call.score_vector_parts, unit, padded(size.scorer))),
              score_bias(part(call.score_bias_parts, unit, padded(1))) {}
        static A *part(void *all, ptrdiff_t unit, ptrdiff_t numbers) {
            return all ? static_cast<A *>(all) + unit * numbers : nullptr;
        }
        A *query, *query_bias, *position, *output, *output_bias, *score, *context, *score_vector, *score_bias;
    };

    // Scratch of a backward beyond that of the patch.
    struct BackwardPieces {
        BackwardPieces(const Sizes &size, Pieces<A> &pieces)
            : queries_row(padded(size.queries) + 16), residual_row(padded(size.residual)),
              channels_row(padded(size.channels)), through(pieces.take(size.block)),
              grad(pieces.take(size.channels * size.block)), x_grad(pieces.take(size.channels * size.tokens_padded)),
              x_turned(pieces.take(size.block * channels_row)), attended_grad(pieces.take(size.queries * size.block)),
              queries_grad(pieces.take(size.queries * size.block)), logits_grad(pieces.take(size.tokens * size.block)),
              queries_turned(pieces.take(size.block * queries_row)),
              attended_turned(pieces.take(size.block * queries_row)),
              attended_grad_turned(pieces.take(size.block * queries_row)),
              keys_grad(pieces.take(size.maps * size.tokens * residual_row)),
              values_grad(pieces.take(size.maps * size.tokens * residual_row)), mean_grad(pieces.take(size.channels)),
              turned_back(pieces.take(residual_row * size.block)) {}
        ptrdiff_t queries_row, residual_row, channels_row;
        ptrdiff_t through, grad, x_grad, x_turned, attended_grad, queries_grad, logits_grad, queries_turned,
            attended_turned, attended_grad_turned, keys_grad, values_grad, mean_grad, turned_back;
    };

    static void backward(const RcuBackward &call) {
        const Sizes size(call.shape);
        const Blocks blocks(size);
        Pieces<A> pieces;
        const Patch patch(size, blocks, pieces);
        const BackwardPieces more(size, pieces);
        const Scratch<A> scratch(pieces.used, call.threads);
        const ptrdiff_t units = rcu_units_an_image(call.shape);
        each_when_free(call.threads, call.shape.batch * units, [&](ptrdiff_t number, int thread) {
            const Sums sums(call, size, number);
            const ptrdiff_t unit = number % units;
            const ptrdiff_t first = size.patches * unit / units, last = size.patches * (unit + 1) / units;
            A *mine = scratch.of(thread);
            std::memset(mine, 0, size_t(pieces.used) * sizeof(A));
            for (ptrdiff_t one = first; one < last; ++one)
                backward_patch(call, patch, more, sums, mine, number / units, one);
        });
    }

    static void backward_patch(
        const RcuBackward &call, const Patch &patch, const BackwardPieces &more, const Sums &sums, A *scratch,
        ptrdiff_t b, ptrdiff_t number) {
        const Sizes &size = patch.size;
        const Weights weights(call.weights);
        const ptrdiff_t origin = size.origin(number);
        const ptrdiff_t x_origin = b * size.channels * size.pixels + origin;
        const ptrdiff_t map_origin = b * size.maps * size.residual * size.pixels + origin;
        const S *x = static_cast<const S *>(call.x) + x_origin;
        const S *out_grad = static_cast<const S *>(call.out_grad) + x_origin;
        const bool attention_wanted = call.x_grad || call.keys_grad || call.values_grad || sums.query ||
                                      sums.query_bias || sums.position;

        patch.average(scratch, x, 1);
        const A score = patch.importance(scratch, scratch + patch.means, weights, b);
        const bool skipped = is_skipped(call.threshold, score);
        A score_grad = static_cast<const A *>(call.score_grad)[b * size.patches + number];
        const ptrdiff_t map_numbers = size.maps * size.tokens * more.residual_row;
        std::memset(scratch + more.keys_grad, 0, size_t(map_numbers) * sizeof(A));
        std::memset(scratch + more.values_grad, 0, size_t(map_numbers) * sizeof(A));
        if (!skipped)
            patch.gather_maps(
                scratch, static_cast<const S *>(call.keys) + b * size.image_step + origin,
                static_cast<const S *>(call.values) + b * size.image_step + origin);

        for (const Block &block : patch.blocks) {
            if (!skipped)
                patch.gather_block(scratch + patch.x, x, block);
            A *grad = scratch + more.grad, *x_grad = scratch + more.x_grad + block.first;
            patch.gather_block(grad, out_grad, block);
            if (!skipped)
                score_grad += backward_block(patch, weights, more, sums, scratch, block, score, attention_wanted);
            if (!call.x_grad)
                continue;
            if (skipped)
                for (ptrdiff_t c = 0; c < size.channels; ++c)
                    std::memcpy(x_grad + c * size.tokens_padded, grad + c * size.block, size_t(size.block) * sizeof(A));
            else
                multiply<A, Start::matrix>(
                    size.channels, size.block, size.queries,
                    {weights.query, 1, size.channels, scratch + more.queries_grad, size.block, x_grad,
                     size.tokens_padded, grad, size.block});
        }

        A *mean_grad = scratch + more.mean_grad;
        backward_score(patch, weights, sums, scratch, score_grad * score * (1 - score), mean_grad);
        for (const Block &block : patch.blocks) {
            if (call.x_grad)
                for (ptrdiff_t c = 0; c < size.channels; ++c) {
                    A *row = scratch + more.x_grad + c * size.tokens_padded + block.first;
                    const A part = mean_grad[c] / A(size.tokens);
                    for (ptrdiff_t t = 0; t < size.block; ++t)
                        row[t] += part;
                    block.scatter(static_cast<S *>(call.x_grad) + x_origin + c * size.pixels, row);
                }
            for (ptrdiff_t map = 0; map < size.maps; ++map) {
                scatter_maps(call.keys_grad, more.keys_grad, patch, more, scratch, block, map, map_origin);
                scatter_maps(call.values_grad, more.values_grad, patch, more, scratch, block, map, map_origin);
            }
        }
    }

    // A block of the gradient of keys or values, which is summed as (maps, tokens, residual).
    static void scatter_maps(
        void *all, ptrdiff_t sums_at, const Patch &patch, const BackwardPieces &more, A *scratch, const Block &block,
        ptrdiff_t map, ptrdiff_t map_origin) {
        if (!all)
            return;
        const Sizes &size = patch.size;
        S *to = static_cast<S *>(all) + map_origin + map * size.residual * size.pixels;
        const A *from = scratch + sums_at + (map * size.tokens + block.first) * more.residual_row;
        A *turned = scratch + more.turned_back;
        transpose(turned, size.block, from, more.residual_row, block.count, size.residual);
        for (ptrdiff_t r = 0; r < size.residual; ++r)
            block.scatter(to + r * size.pixels, turned + r * size.block);
    }

    // Gradients through the update of a block. Returns sum(out_grad * update), its part of the score's gradient; leaves
    // the queries' gradient, and adds to the keys' and values', transposed.
    static A backward_block(
        const Patch &patch, const Weights &weights, const BackwardPieces &more, const Sums &sums, A *scratch,
        const Block &at, A score, bool attention_wanted) {
        const Sizes &size = patch.size;
        const ptrdiff_t block = size.block, count = at.count;
        A *grad = scratch + more.grad, *attended = scratch + patch.attended;
        A *attended_grad = scratch + more.attended_grad, *queries_grad = scratch + more.queries_grad;

        for_columns<A>(block, [&](auto vectors, ptrdiff_t n) {
            patch.template project<vectors>(scratch, weights, {n, n, block});
        });
        multiply<A, Start::zero>(
            size.queries, block, size.channels,
            {weights.output, 1, size.queries, grad, block, attended_grad, block, nullptr, 0});
        A score_grad = 0;
        for (ptrdiff_t c = 0; c < size.channels; ++c) {
            const A total = row_sum(grad + c * block, count);
            score_grad += weights.output_bias[c] * total;
            if (sums.output_bias)
                sums.output_bias[c] += score * total;
        }
        transpose(scratch + more.queries_turned, more.queries_row, scratch + patch.queries, block, size.queries, count);
        transpose(scratch + more.attended_grad_turned, more.queries_row, attended_grad, block, size.queries, count);
        for (ptrdiff_t map = 0; map < size.maps; ++map)
            for (ptrdiff_t head = 0; head < size.heads; ++head) {
                const ptrdiff_t which = (map * size.heads + head) * size.residual;
                for_columns<A>(block, [&](auto vectors, ptrdiff_t n) {
                    patch.template attend<vectors>(scratch, weights, map, head, at, {n, n, block});
                });
                for (ptrdiff_t r = which; r < which + size.residual; ++r)
                    score_grad += dot(attended + r * block, attended_grad + r * block, count);
                if (attention_wanted)
                    backward_head(patch, more, sums, scratch, map, head, at, score);
            }
        if (sums.output) {
            A *turned = scratch + more.attended_turned;
            transpose(turned, more.queries_row, attended, block, size.queries, count);
            for (ptrdiff_t i = 0; i < count * more.queries_row; ++i)
                turned[i] *= score;
            multiply<A, Start::result>(
                size.channels, padded(size.queries), count,
                {grad, block, 1, turned, more.queries_row, sums.output, padded(size.queries), nullptr, 0});
        }
        if (sums.query_bias)
            for (ptrdiff_t k = 0; k < size.queries; ++k)
                sums.query_bias[k] += row_sum(queries_grad + k * block, count);
        if (sums.query) {
            A *turned = scratch + more.x_turned;
            transpose(turned, more.channels_row, scratch + patch.x, block, size.channels, count);
            multiply<A, Start::result>(
                size.queries, more.channels_row, count,
                {queries_grad, block, 1, turned, more.channels_row, sums.query, more.channels_row, nullptr, 0});
        }
        return score_grad;
    }

    // One head and one map: from exp(logits) and their scale to the gradients of logits, keys, values and queries.
    static void backward_head(
        const Patch &patch, const BackwardPieces &more, const Sums &sums, A *scratch, ptrdiff_t map, ptrdiff_t head,
        const Block &at, A score) {
        const Sizes &size = patch.size;
        const ptrdiff_t block = size.block, count = at.count, which = (map * size.heads + head) * size.residual;
        const A *attended = scratch + patch.attended + which * block;
        const A *attended_grad = scratch + more.attended_grad + which * block;
        const A *scale = scratch + patch.scale;
        A *logits = scratch + patch.logits, *logits_grad = scratch + more.logits_grad, *through = scratch + more.through;

        // Gradient of the probabilities, still without the score: (tokens, block).
        multiply<A, Start::zero>(
            size.tokens, block, size.residual,
            {scratch + patch.values + map * size.residual * size.tokens, 1, size.tokens, attended_grad, block,
             logits_grad, block, nullptr, 0});
        for (ptrdiff_t n = 0; n < block; n += lanes<A>) {
            V total{};
            for (ptrdiff_t r = 0; r < size.residual; ++r)
                total += load(attended + r * block + n) * load(attended_grad + r * block + n);
            store(through + n, total);
            const V factor = load(scale + n);
            for (ptrdiff_t j = 0; j < size.tokens; ++j) {
                const V probability = load(logits + j * block + n) * factor;
                const V gradient = load(logits_grad + j * block + n);
                store(logits + j * block + n, score * probability);
                store(logits_grad + j * block + n, score * probability * (gradient - total));
            }
        }
        if (sums.position) {
            A *position = sums.position + head * size.tokens * size.tokens_padded;
            position += at.first;
            for (ptrdiff_t j = 0; j < size.tokens; ++j)
                add_scaled(position + j * size.tokens_padded, logits_grad + j * block, A(1), block);
        }
        multiply<A, Start::result>(
            size.tokens, more.residual_row, count,
            {logits, block, 1, scratch + more.attended_grad_turned + which, more.queries_row,
             scratch + more.values_grad + map * size.tokens * more.residual_row, more.residual_row, nullptr, 0});
        multiply<A, Start::result>(
            size.tokens, more.residual_row, count,
            {logits_grad, block, 1, scratch + more.queries_turned + which, more.queries_row,
             scratch + more.keys_grad + map * size.tokens * more.residual_row, more.residual_row, nullptr, 0});
        multiply<A, Start::zero>(
            size.residual, block, size.tokens,
            {scratch + patch.keys + map * size.residual * size.tokens, size.tokens, 1, logits_grad, block,
             scratch + more.queries_grad + which * block, block, nullptr, 0});
    }

    // From the gradient before the sigmoid to those of the scorer, and of the patch's mean.
    static void backward_score(
        const Patch &patch, const Weights &weights, const Sums &sums, A *scratch, A grad, A *mean_grad) {
        const Sizes &size = patch.size;
        const A *mean = scratch + patch.means, *hidden = scratch + patch.hidden;
        std::memset(mean_grad, 0, size_t(size.channels) * sizeof(A));
        if (sums.score_bias)
            sums.score_bias[0] += grad;
        for (ptrdiff_t i = 0; i < size.scorer; ++i) {
            if (sums.score_vector)
                sums.score_vector[i] += grad * hidden[i];
            const A through = hidden[i] <= 0 ? A(0) : grad * weights.score_vector[i];
            if (sums.context)
                sums.context[i] += through;
            if (sums.score)
                add_scaled(sums.score + i * padded(size.channels), mean, through, size.channels);
            add_scaled(mean_grad, weights.score + i * size.channels, through, size.channels);
        }
    }
};

}  // namespace

namespace grcsf {
namespace GRCSF_ISA {
void (*const rcu_forward[dtypes])(const RcuForward &) = {
    Rcu<float>::forward, Rcu<bfloat16>::forward, Rcu<double>::forward};
void (*const rcu_backward[dtypes])(const RcuBackward &) = {
    Rcu<float>::backward, Rcu<bfloat16>::backward, Rcu<double>::backward};
}  // namespace GRCSF_ISA
}  // namespace grcsf
