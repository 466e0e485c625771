// Patch cross-attention with importance scoring, forward and backward; what it means: grcsf_fast/reference.py.
//
// One thread takes one patch at a time, copies it into its scratch and does everything there. Tokens lie along the
// vectors' lanes: every product is (rows of numbers, broadcast) x (rows of tokens), and the softmax runs over rows.
// Large patches go in blocks of query tokens, so that no buffer is larger than (tokens, block).

#include "kernels.h"
#include "simd.h"

namespace {

using namespace grcsf;

constexpr ptrdiff_t block_tokens = 64;

// Sizes that follow from a shape.
struct Sizes {
    explicit Sizes(const RcuShape &of)
        : channels(of.channels), maps(of.maps), residual(of.residual), heads(of.heads), scorer(of.width_of_scorer),
          patch(of.patch), rows(of.planar ? of.patch : of.patch * of.patch), tokens(rows * of.patch),
          queries(of.maps * of.heads * of.residual), down(of.planar ? 1 : of.depth / of.patch),
          across(of.height / of.patch), along(of.width / of.patch), patches(down * across * along),
          pixels(of.depth * of.height * of.width), row(of.width), plane(of.height * of.width), planar(of.planar),
          tokens_padded(padded(tokens)), block(tokens_padded < block_tokens ? tokens_padded : block_tokens) {}

    // First pixel of a patch, and of one of its rows of pixels.
    ptrdiff_t origin(ptrdiff_t number) const {
        const ptrdiff_t x = number % along, y = number / along % across, z = number / along / across;
        return patch * (z * plane + y * row + x);
    }
    ptrdiff_t row_offset(ptrdiff_t i) const { return planar ? i * row : i / patch * plane + i % patch * row; }

    ptrdiff_t channels, maps, residual, heads, scorer, patch, rows, tokens, queries;
    ptrdiff_t down, across, along, patches, pixels, row, plane;
    bool planar;
    ptrdiff_t tokens_padded, block;
};

// The tokens [first, first + count) of a patch as stretches of neighbouring pixels.
struct Stretches {
    Stretches(const Sizes &size, ptrdiff_t first, ptrdiff_t count) : number(0) {
        for (ptrdiff_t done = 0; done < count;) {
            const ptrdiff_t token = first + done, inside = token % size.patch;
            const ptrdiff_t left = size.patch - inside, length = left < count - done ? left : count - done;
            at[number] = size.row_offset(token / size.patch) + inside;
            lengths[number++] = length;
            done += length;
        }
    }
    template <class S, class A> void gather(A *to, const S *from) const {
        for (int i = 0; i < number; ++i) {
            convert_row(to, from + at[i], lengths[i]);
            to += lengths[i];
        }
    }
    template <class S, class A> void scatter(S *to, const A *from) const {
        for (int i = 0; i < number; ++i) {
            convert_row(to + at[i], from, lengths[i]);
            from += lengths[i];
        }
    }
    int number;
    ptrdiff_t at[block_tokens], lengths[block_tokens];
};

// A piece of a thread's scratch after another.
template <class A> struct Pieces {
    ptrdiff_t used = 0;
    ptrdiff_t take(ptrdiff_t numbers) {
        const ptrdiff_t first = used;
        used += padded(numbers);
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
        Patch(const Sizes &size, Pieces<A> &pieces)
            : size(size), x(pieces.take(size.channels * size.block)),
              keys(pieces.take(size.maps * size.residual * size.tokens)),
              values(pieces.take(size.maps * size.residual * size.tokens)),
              queries(pieces.take(size.queries * size.block)), attended(pieces.take(size.queries * size.block)),
              logits(pieces.take(size.tokens * size.block)), mean(pieces.take(size.channels)),
              hidden(pieces.take(size.scorer)) {}

        // (channels, block) of the tokens [first, first + count); padding tokens are 0.
        static void gather_block(const Sizes &size, A *to, const S *from, ptrdiff_t first, ptrdiff_t count) {
            const Stretches stretches(size, first, count);
            for (ptrdiff_t c = 0; c < size.channels; ++c, to += size.block) {
                stretches.gather(to, from + c * size.pixels);
                for (ptrdiff_t t = count; t < size.block; ++t)
                    to[t] = 0;
            }
        }

        // Score of the patch at `from`; leaves the first block in `x`, the mean and the scorer's hidden layer.
        A importance(A *scratch, const S *from, const Weights &weights, ptrdiff_t image) const {
            A *means = scratch + mean;
            for (ptrdiff_t c = 0; c < size.channels; ++c)
                means[c] = 0;
            ptrdiff_t first = (size.tokens - 1) / size.block * size.block;
            for (; first >= 0; first -= size.block) {
                const ptrdiff_t count = count_of(first);
                gather_block(size, scratch + x, from, first, count);
                for (ptrdiff_t c = 0; c < size.channels; ++c)
                    means[c] += row_sum(scratch + x + c * size.block, count);
            }
            for (ptrdiff_t c = 0; c < size.channels; ++c)
                means[c] /= A(size.tokens);
            A total = 0;
            for (ptrdiff_t i = 0; i < size.scorer; ++i) {
                const A value = dot(weights.score + i * size.channels, means, size.channels) +
                                weights.context[image * size.scorer + i];
                // Written so that NaN goes through, as in torch.relu.
                scratch[hidden + i] = value < 0 ? A(0) : value;
                total += scratch[hidden + i] * weights.score_vector[i];
            }
            return 1 / (1 + std::exp(-(total + weights.score_bias[0])));
        }

        void gather_maps(A *scratch, const S *key, const S *value) const {
            for (ptrdiff_t first = 0; first < size.tokens; first += size.block) {
                const Stretches stretches(size, first, count_of(first));
                for (ptrdiff_t i = 0; i < size.maps * size.residual; ++i) {
                    stretches.gather(scratch + keys + i * size.tokens + first, key + i * size.pixels);
                    stretches.gather(scratch + values + i * size.tokens + first, value + i * size.pixels);
                }
            }
        }

        // (queries, block) from `x`.
        void project(A *scratch, const Weights &weights) const {
            multiply<A, Start::rows>(
                size.queries, size.block, size.channels,
                {weights.query, size.channels, 1, scratch + x, size.block, scratch + queries, size.block,
                 weights.query_bias, 0});
        }

        // Attention of one head to one map: exp(logits - greatest) (tokens, block), and 1 / their sum, (block), into
        // `scale`.
        void attend(A *scratch, const Weights &weights, ptrdiff_t map, ptrdiff_t head, ptrdiff_t first, A *scale) const {
            const ptrdiff_t which = (map * size.heads + head) * size.residual;
            A *all = scratch + logits;
            multiply<A, Start::matrix>(
                size.tokens, size.block, size.residual,
                {scratch + keys + map * size.residual * size.tokens, 1, size.tokens, scratch + queries + which * size.block,
                 size.block, all, size.block, weights.position + head * size.tokens * size.tokens_padded + first,
                 size.tokens_padded});
            for (ptrdiff_t n = 0; n < size.block; n += lanes<A>) {
                V greatest = broadcast(-std::numeric_limits<A>::infinity());
                for (ptrdiff_t j = 0; j < size.tokens; ++j) {
                    const V value = load(all + j * size.block + n);
                    greatest = greatest < value ? value : greatest;
                }
                V total{};
                for (ptrdiff_t j = 0; j < size.tokens; ++j) {
                    const V value = exponential(load(all + j * size.block + n) - greatest);
                    store(all + j * size.block + n, value);
                    total += value;
                }
                store(scale + n, A(1) / total);
            }
        }

        // (queries, block): what each head read from each map.
        void read_values(A *scratch, ptrdiff_t map, ptrdiff_t head, const A *scale) const {
            A *to = scratch + attended + (map * size.heads + head) * size.residual * size.block;
            multiply<A, Start::zero>(
                size.residual, size.block, size.tokens,
                {scratch + values + map * size.residual * size.tokens, size.tokens, 1, scratch + logits, size.block, to,
                 size.block, nullptr, 0});
            for (ptrdiff_t r = 0; r < size.residual; ++r)
                for (ptrdiff_t n = 0; n < size.block; n += lanes<A>)
                    store(to + r * size.block + n, load(to + r * size.block + n) * load(scale + n));
        }

        ptrdiff_t count_of(ptrdiff_t first) const {
            return size.tokens - first < size.block ? size.tokens - first : size.block;
        }

        const Sizes &size;
        ptrdiff_t x, keys, values, queries, attended, logits, mean, hidden;
    };

    static void forward(const RcuForward &call) {
        const Sizes size(call.shape);
        const Weights weights(call.weights);
        Pieces<A> pieces;
        const Patch patch(size, pieces);
        const ptrdiff_t scale_at = pieces.take(size.block), update_at = pieces.take(size.channels * size.block);
        const Scratch<A> scratch(pieces.used);
#pragma omp parallel for collapse(2) schedule(dynamic, 8)
        for (ptrdiff_t b = 0; b < call.shape.batch; ++b)
            for (ptrdiff_t number = 0; number < size.patches; ++number) {
                A *mine = scratch.mine();
                const ptrdiff_t origin = size.origin(number);
                const S *x = static_cast<const S *>(call.x) + b * size.channels * size.pixels + origin;
                S *out = static_cast<S *>(call.out) + b * size.channels * size.pixels + origin;
                const A score = patch.importance(mine, x, weights, b);
                static_cast<A *>(call.score)[b * size.patches + number] = score;
                const bool skipped = call.threshold > 0 && !(score >= A(call.threshold));
                if (!skipped) {
                    const ptrdiff_t map_origin = b * size.maps * size.residual * size.pixels + origin;
                    patch.gather_maps(
                        mine, static_cast<const S *>(call.keys) + map_origin,
                        static_cast<const S *>(call.values) + map_origin);
                }
                for (ptrdiff_t first = 0; first < size.tokens; first += size.block) {
                    const ptrdiff_t count = patch.count_of(first);
                    if (first)
                        Patch::gather_block(size, mine + patch.x, x, first, count);
                    if (!skipped)
                        update_block(patch, weights, mine, first, score, mine + scale_at, mine + update_at);
                    const Stretches stretches(size, first, count);
                    for (ptrdiff_t c = 0; c < size.channels; ++c)
                        stretches.scatter(out + c * size.pixels, mine + (skipped ? patch.x : update_at) + c * size.block);
                }
            }
    }

    // (channels, block): x + score * update.
    static void update_block(
        const Patch &patch, const Weights &weights, A *scratch, ptrdiff_t first, A score, A *scale, A *to) {
        const Sizes &size = patch.size;
        patch.project(scratch, weights);
        for (ptrdiff_t map = 0; map < size.maps; ++map)
            for (ptrdiff_t head = 0; head < size.heads; ++head) {
                patch.attend(scratch, weights, map, head, first, scale);
                patch.read_values(scratch, map, head, scale);
            }
        multiply<A, Start::rows>(
            size.channels, size.block, size.queries,
            {weights.output, size.queries, 1, scratch + patch.attended, size.block, to, size.block, weights.output_bias,
             0});
        const A *x = scratch + patch.x;
        for (ptrdiff_t i = 0; i < size.channels * size.block; ++i)
            to[i] = x[i] + score * to[i];
    }

    // Gradients of the weights of one part, in the layout of RcuBackward; null where nobody asks.
    struct Sums {
        Sums(const RcuBackward &call, const Sizes &size, ptrdiff_t unit)
            : query(part(call.query_weight, unit, size.queries * padded(size.channels))),
              query_bias(part(call.query_bias, unit, padded(size.queries))),
              position(part(call.position_bias, unit, size.heads * size.tokens * size.tokens_padded)),
              output(part(call.output_weight, unit, size.channels * padded(size.queries))),
              output_bias(part(call.output_bias, unit, padded(size.channels))),
              score(part(call.score_weight, unit, size.scorer * padded(size.channels))),
              context(part(call.score_context, unit, padded(size.scorer))),
              score_vector(part(call.score_vector, unit, padded(size.scorer))),
              score_bias(part(call.score_bias, unit, padded(1))) {}
        static A *part(void *all, ptrdiff_t unit, ptrdiff_t numbers) {
            return all ? static_cast<A *>(all) + unit * numbers : nullptr;
        }
        A *query, *query_bias, *position, *output, *output_bias, *score, *context, *score_vector, *score_bias;
    };

    // Scratch of a backward beyond that of the patch.
    struct BackwardPieces {
        BackwardPieces(const Sizes &size, Pieces<A> &pieces)
            : queries_row(padded(size.queries) + 16), residual_row(padded(size.residual)),
              channels_row(padded(size.channels)), scale(pieces.take(size.block)), through(pieces.take(size.block)),
              grad(pieces.take(size.channels * size.block)), x_grad(pieces.take(size.channels * size.block)),
              x_turned(pieces.take(size.block * channels_row)), attended_grad(pieces.take(size.queries * size.block)),
              queries_grad(pieces.take(size.queries * size.block)), logits_grad(pieces.take(size.tokens * size.block)),
              queries_turned(pieces.take(size.block * queries_row)),
              attended_turned(pieces.take(size.block * queries_row)),
              attended_grad_turned(pieces.take(size.block * queries_row)),
              keys_grad(pieces.take(size.maps * size.tokens * residual_row)),
              values_grad(pieces.take(size.maps * size.tokens * residual_row)), mean_grad(pieces.take(size.channels)),
              line(pieces.take(size.tokens)) {}
        ptrdiff_t queries_row, residual_row, channels_row;
        ptrdiff_t scale, through, grad, x_grad, x_turned, attended_grad, queries_grad, logits_grad, queries_turned,
            attended_turned, attended_grad_turned, keys_grad, values_grad, mean_grad, line;
    };

    static void backward(const RcuBackward &call) {
        const Sizes size(call.shape);
        Pieces<A> pieces;
        const Patch patch(size, pieces);
        const BackwardPieces more(size, pieces);
        const Scratch<A> scratch(pieces.used);
        const ptrdiff_t units = rcu_units_an_image(call.shape);
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
        for (ptrdiff_t b = 0; b < call.shape.batch; ++b)
            for (ptrdiff_t unit = 0; unit < units; ++unit) {
                const Sums sums(call, size, b * units + unit);
                const ptrdiff_t first = size.patches * unit / units, last = size.patches * (unit + 1) / units;
                std::memset(scratch.mine(), 0, size_t(pieces.used) * sizeof(A));
                for (ptrdiff_t number = first; number < last; ++number)
                    backward_patch(call, patch, more, sums, scratch.mine(), b, number);
            }
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
        S *x_grad = call.x_grad ? static_cast<S *>(call.x_grad) + x_origin : nullptr;
        const bool maps_wanted = call.keys_grad || call.values_grad;
        const bool attention_wanted = x_grad || maps_wanted || sums.query || sums.query_bias || sums.position;

        const A score = patch.importance(scratch, x, weights, b);
        const bool skipped = call.threshold > 0 && !(score >= A(call.threshold));
        A score_grad = static_cast<const A *>(call.score_grad)[b * size.patches + number];
        const ptrdiff_t map_numbers = size.maps * size.tokens * more.residual_row;
        std::memset(scratch + more.keys_grad, 0, size_t(map_numbers) * sizeof(A));
        std::memset(scratch + more.values_grad, 0, size_t(map_numbers) * sizeof(A));
        if (!skipped)
            patch.gather_maps(
                scratch, static_cast<const S *>(call.keys) + map_origin,
                static_cast<const S *>(call.values) + map_origin);

        for (ptrdiff_t first = 0; first < size.tokens; first += size.block) {
            const ptrdiff_t count = patch.count_of(first);
            const Stretches stretches(size, first, count);
            if (first && !skipped)
                Patch::gather_block(size, scratch + patch.x, x, first, count);
            A *grad = scratch + more.grad;
            Patch::gather_block(size, grad, out_grad, first, count);
            A *to = grad;
            if (!skipped) {
                score_grad += backward_block(patch, weights, more, sums, scratch, first, count, score, attention_wanted);
                if (x_grad) {
                    to = scratch + more.x_grad;
                    multiply<A, Start::matrix>(
                        size.channels, size.block, size.queries,
                        {weights.query, 1, size.channels, scratch + more.queries_grad, size.block, to, size.block, grad,
                         size.block});
                }
            }
            if (x_grad && size.tokens > size.block)
                for (ptrdiff_t c = 0; c < size.channels; ++c)
                    stretches.scatter(x_grad + c * size.pixels, to + c * size.block);
            else if (to != scratch + more.x_grad)
                std::memcpy(scratch + more.x_grad, to, size_t(size.channels * size.block) * sizeof(A));
        }

        A *mean_grad = scratch + more.mean_grad;
        backward_score(patch, weights, sums, scratch, score_grad * score * (1 - score), mean_grad);
        if (x_grad)
            for (ptrdiff_t c = 0; c < size.channels; ++c) {
                const A part = mean_grad[c] / A(size.tokens);
                for (ptrdiff_t first = 0; first < size.tokens; first += size.block) {
                    const Stretches stretches(size, first, patch.count_of(first));
                    A *row = scratch + more.x_grad + c * size.block;
                    if (size.tokens > size.block)
                        stretches.gather(row, x_grad + c * size.pixels);
                    for (ptrdiff_t t = 0; t < size.block; ++t)
                        row[t] += part;
                    stretches.scatter(x_grad + c * size.pixels, row);
                }
            }
        for (int which = 0; which < 2; ++which) {
            S *maps_grad = static_cast<S *>(which ? call.values_grad : call.keys_grad);
            if (!maps_grad)
                continue;
            const A *turned = scratch + (which ? more.values_grad : more.keys_grad);
            A *line = scratch + more.line;
            for (ptrdiff_t first = 0; first < size.tokens; first += size.block) {
                const Stretches stretches(size, first, patch.count_of(first));
                for (ptrdiff_t i = 0; i < size.maps * size.residual; ++i) {
                    const A *from = turned + i / size.residual * size.tokens * more.residual_row + i % size.residual;
                    for (ptrdiff_t t = 0; t < patch.count_of(first); ++t)
                        line[t] = from[(first + t) * more.residual_row];
                    stretches.scatter(maps_grad + map_origin + i * size.pixels, line);
                }
            }
        }
    }

    // Gradients through the update of a block. Returns sum(out_grad * update), its part of the score's gradient; leaves
    // the queries' gradient, and adds to the keys' and values', transposed.
    static A backward_block(
        const Patch &patch, const Weights &weights, const BackwardPieces &more, const Sums &sums, A *scratch,
        ptrdiff_t first, ptrdiff_t count, A score, bool attention_wanted) {
        const Sizes &size = patch.size;
        const ptrdiff_t block = size.block;
        A *grad = scratch + more.grad, *attended = scratch + patch.attended, *scale = scratch + more.scale;
        A *attended_grad = scratch + more.attended_grad, *queries_grad = scratch + more.queries_grad;

        patch.project(scratch, weights);
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
                patch.attend(scratch, weights, map, head, first, scale);
                patch.read_values(scratch, map, head, scale);
                for (ptrdiff_t r = which; r < which + size.residual; ++r)
                    score_grad += dot(attended + r * block, attended_grad + r * block, count);
                if (attention_wanted)
                    backward_head(patch, more, sums, scratch, map, head, first, count, score);
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
        ptrdiff_t first, ptrdiff_t count, A score) {
        const Sizes &size = patch.size;
        const ptrdiff_t block = size.block, which = (map * size.heads + head) * size.residual;
        const A *attended = scratch + patch.attended + which * block;
        const A *attended_grad = scratch + more.attended_grad + which * block;
        const A *scale = scratch + more.scale;
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
            position += first;
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
        const A *mean = scratch + patch.mean, *hidden = scratch + patch.hidden;
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
