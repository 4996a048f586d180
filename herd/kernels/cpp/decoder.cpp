// Layers of a decoder over the new tokens of some sequences; what one computes is in herd/model. Activations between the
// products are float32. `run` of a phase is called by all threads of a team, which wait for each other where one part
// needs what another made.
#include "own.h"

namespace herd {
namespace {

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
  float lanes[16] = {}, sum = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; j++) lanes[j] += x[i + j] * x[i + j];
  for (; i < count; i++) sum += x[i] * x[i];
  for (int j = 0; j < 16; j++) sum += lanes[j];
  const float factor = 1 / std::sqrt(sum / count + eps);
  for (i = 0; i < count; i++) out[i] = x[i] * factor * (weight ? weight[i] : 1);
}

// Pairs (2i, 2i + 1) of a head turned by angles given as cosine and sine [d / 2, 2].
void rotate(float* x, const float* turns, int64_t d) {
  for (int64_t i = 0; i < d; i += 2) {
    const float a = x[i], b = x[i + 1];
    x[i] = a * turns[i] - b * turns[i + 1];
    x[i + 1] = a * turns[i + 1] + b * turns[i];
  }
}

// One panel of gates [16] and ups [16] to their products.
void swiglu(const float* sums, float* out) {
  for (int i = 0; i < 16; i++) {
    const float gate = sums[i], small = exponential(-std::fabs(gate));
    out[i] = gate * (gate >= 0 ? 1 : small) / (1 + small) * sums[16 + i];
  }
}

void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

// Columns of one panel that a weight has.
int64_t columns(const Weight& w, int64_t panel) { return least(PANEL, w.N - panel * PANEL); }

// Queries, keys and values [N, (H + 2 G) d] of tokens, rotated, normalised and with their temperature.
struct Projection {
  const Decoder& decoder;
  const Layer& layer;
  const Batch& batch;
  float* qkv;
  Rows rows;
  Projection(const Decoder& decoder, const Layer& layer, const Batch& batch, float* qkv)
      : decoder(decoder), layer(layer), batch(batch), qkv(qkv), rows(batch.N, layer.qkv) {}

  void run() {
    const int64_t D = decoder.D, width = layer.qkv.N;
    {
      Buffer<float> normed(D);
#pragma omp for
      for (int64_t n = 0; n < batch.N; n++) {
        rms_norm(batch.x + n * D, layer.attention_norm, D, decoder.eps, normed.at);
        rows.put(normed.at, n, 0, batch.N);
      }
    }
    const Product product = {&layer.qkv, &rows, 0, batch.N};
    multiply(&product, 1, [&](int64_t, int64_t row, int64_t R, int64_t panel, const float* sums) {
      for (int64_t r = 0; r < R; r++)
        std::memcpy(qkv + (row + r) * width + panel * PANEL, sums + r * PANEL, columns(layer.qkv, panel) * 4);
    });
#pragma omp for
    for (int64_t n = 0; n < batch.N; n++) place(qkv + n * width, n);
  }

  void place(float* heads, int64_t n) const {
    const int64_t H = decoder.H, d = decoder.d;
    if (!layer.local) {
      if (batch.temperature)
        for (int64_t i = 0; i < H * d; i++) heads[i] *= batch.temperature[n];
      return;
    }
    for (int64_t h = 0; h < H + decoder.G; h++, heads += d) {
      rotate(heads, batch.turns + n * d, d);
      if (layer.qk_norm) rms_norm(heads, nullptr, d, decoder.eps, heads);
    }
  }
};

// Attention of new tokens to those before them and themselves, which are remembered. attended: [N, H, d]
struct OwnAttention {
  const Decoder& decoder;
  const Layer& layer;
  const Sequence* sequences;
  int64_t count, at;  // at: which of the sequences' layers this is
  const float* qkv;
  float* attended;

  int64_t width() const { return (decoder.H + 2 * decoder.G) * decoder.d; }
  int64_t group() const { return decoder.H / decoder.G; }
  int64_t past(const Sequence& s) const { return layer.local ? s.local_past : s.global_past; }
  Memory memory(const Sequence& s, int64_t g) const {
    return Memory(s.memory[at], g, layer.local ? s.local_capacity : s.global_capacity, decoder.d);
  }
  int64_t tiles(const Sequence& s) const { return (s.tokens * group() + ROWS - 1) / ROWS; }

  void run() {
    // Two tokens share a word of memory, so one thread writes all of a head.
#pragma omp for
    for (int64_t unit = 0; unit < count * decoder.G; unit++) remember(sequences[unit / decoder.G], unit % decoder.G);
    int64_t units = 0;
    for (int64_t s = 0; s < count; s++) units += tiles(sequences[s]) * decoder.G;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; unit++) {
      int64_t s = 0, left = unit;
      while (left >= tiles(sequences[s]) * decoder.G) left -= tiles(sequences[s++]) * decoder.G;
      attend(sequences[s], left % decoder.G, left / decoder.G * ROWS);
    }
  }

  void remember(const Sequence& s, int64_t g) const {
    const float* k = qkv + s.first * width() + (decoder.H + g) * decoder.d;
    memory(s, g).put(past(s), s.tokens, k, k + decoder.G * decoder.d, width());
  }

  // ROWS queries of one head of keys: all queries of a token, then those of the next.
  void attend(const Sequence& s, int64_t g, int64_t first) const {
    Query queries[ROWS];
    const int64_t R = least(ROWS, s.tokens * group() - first), d = decoder.d;
    for (int64_t r = 0; r < R; r++) {
      const int64_t t = (first + r) / group(), head = g * group() + (first + r) % group(), n = s.first + t;
      queries[r] = {qkv + n * width() + head * d, past(s) + t + 1, attended + (n * decoder.H + head) * d};
    }
    attend_own(memory(s, g), queries, R, 1 / std::sqrt((float)d));
  }
};

float inner_product(const float* a, const float* b, int64_t count) {
  float lanes[16] = {}, sum = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; j++) lanes[j] += a[i + j] * b[i + j];
  for (; i < count; i++) sum += a[i] * b[i];
  for (int j = 0; j < 16; j++) sum += lanes[j];
  return sum;
}

// Which experts tokens go to, and where: those of one expert stand together.
struct Routing {
  const Layer& layer;
  int64_t N, K;  // K: experts of a token
  Buffer<float> logits, score;
  Buffer<int32_t> expert, place, begin;  // [N, K], [N, K], [E + 1]
  Routing(const Layer& layer, int64_t N)
      : layer(layer), N(N), K(layer.top_k), logits(N * layer.E), score(N * K), expert(N * K), place(N * K),
        begin(layer.E + 1) {}

  void choose(const float* x, int64_t n, int64_t D) {
    float* logit = logits.at + n * layer.E;
    for (int64_t e = 0; e < layer.E; e++) logit[e] = inner_product(x, layer.router + e * D, D);
    for (int64_t k = 0; k < K; k++) {
      int32_t best = -1;  // never one twice, even beside NaN and infinities
      for (int32_t e = 0; e < layer.E; e++)
        if (!chosen(n, k, e) && (best < 0 || logit[e] > logit[best])) best = e;
      expert.at[n * K + k] = best;
      score.at[n * K + k] = 1 / (1 + std::exp(-logit[best]));
    }
  }

  bool chosen(int64_t n, int64_t count, int32_t e) const {
    bool found = false;
    for (int64_t k = n * K; k < n * K + count; k++) found |= expert.at[k] == e;
    return found;
  }

  void order() {
    begin.at[0] = 0;
    for (int32_t e = 0; e < layer.E; e++) {
      begin.at[e + 1] = begin.at[e];
      for (int64_t i = 0; i < N * K; i++)
        if (expert.at[i] == e) place.at[i] = begin.at[e + 1]++;
    }
  }
};

// The output projection of attention and the feed-forward block, each added to x. That is `run`, or `route`, some `plan`s,
// each with its `feed_forward`, and `add_routed`.
struct Finish {
  const Decoder& decoder;
  const Layer& layer;
  const Batch& batch;
  const float* attended;
  int64_t N, D, K, width;  // width: of what is between gate and down
  Rows out, in, mid, routed_in, routed_mid;
  Routing routing;
  Buffer<float> normed, hidden, routed;
  Buffer<uint8_t> planned;   // [1 + E]: the shared block, then the experts
  Buffer<Product> up, down;  // of what is planned and has tokens
  int64_t products = 0;

  Finish(const Decoder& decoder, const Layer& layer, const Batch& batch, const float* attended)
      : decoder(decoder), layer(layer), batch(batch), attended(attended), N(batch.N), D(decoder.D), K(layer.top_k),
        width(panels(layer.shared.gate_up.N) * 16), out(N, layer.out), in(N, layer.shared.gate_up),
        mid(N, layer.shared.down), routed_in(N * K, a_routed().gate_up), routed_mid(N * K, a_routed().down),
        routing(layer, N), normed(N * D), hidden(N * (1 + K) * width), routed(N * K * D),
        planned(layer.E + 1), up(layer.E + 1), down(layer.E + 1) {}

  const Mlp& a_routed() const { return layer.E ? layer.experts[0] : layer.shared; }

  void run() {
    route();
    feed_forward();
    add_routed();
  }

  // Attention, and which tokens go where; all is planned.
  void route() {
#pragma omp for
    for (int64_t n = 0; n < N; n++) out.put(attended + n * layer.out.K, n, 0, N);
    const Product projection = {&layer.out, &out, 0, N};
    multiply(&projection, 1, [&](int64_t, int64_t row, int64_t R, int64_t panel, const float* sums) {
      for (int64_t r = 0; r < R; r++) add_panel(batch.x, layer.out, row + r, panel, sums + r * PANEL);
    });
#pragma omp for
    for (int64_t n = 0; n < N; n++) {
      float* x = normed.at + n * D;
      rms_norm(batch.x + n * D, layer.mlp_norm, D, decoder.eps, x);
      in.put(x, n, 0, N);
      if (layer.E) routing.choose(x, n, D);
    }
#pragma omp single
    {
      if (layer.E) routing.order();
      plan(nullptr);
    }
    if (layer.E) {
#pragma omp for
      for (int64_t i = 0; i < N * K; i++) put_routed(i);
    }
  }

  void add_panel(float* to, const Weight& w, int64_t row, int64_t panel, const float* sums) const {
    const int64_t count = least(PANEL, w.N - panel * PANEL);
    for (int64_t j = 0; j < count; j++) to[row * D + panel * PANEL + j] += sums[j];
  }

  int32_t tokens(int64_t e) const { return routing.begin.at[e + 1] - routing.begin.at[e]; }

  // which: [1 + E], or null: all.
  void plan(const uint8_t* which) {
    products = 0;
    for (int64_t i = 0; i < layer.E + 1; i++) planned.at[i] = which ? which[i] : 1;
    if (planned.at[0]) {
      up.at[0] = {&layer.shared.gate_up, &in, 0, N};
      down.at[products++] = {&layer.shared.down, &mid, 0, N};
    }
    for (int64_t e = 0; e < layer.E; e++) {
      if (!planned.at[1 + e] || !tokens(e)) continue;
      up.at[products] = {&layer.experts[e].gate_up, &routed_in, routing.begin.at[e], tokens(e)};
      down.at[products++] = {&layer.experts[e].down, &routed_mid, routing.begin.at[e], tokens(e)};
    }
  }

  bool is_shared(int64_t product) const { return planned.at[0] && product == 0; }

  // The score multiplies the expert's input (spec §3.1).
  void put_routed(int64_t i) {
    Buffer<float> x(D);
    for (int64_t j = 0; j < D; j++) x.at[j] = routing.score.at[i] * normed.at[i / K * D + j];
    const int64_t begin = routing.begin.at[routing.expert.at[i]], end = routing.begin.at[routing.expert.at[i] + 1];
    routed_in.put(x.at, routing.place.at[i] - begin, begin, end - begin);
  }

  void feed_forward() {
    multiply(up.at, products, [&](int64_t i, int64_t row, int64_t R, int64_t panel, const float* sums) {
      for (int64_t r = 0; r < R; r++)
        swiglu(sums + r * PANEL, hidden.at + ((is_shared(i) ? 0 : N) + row + r) * width + panel * 16);
    });
#pragma omp for
    for (int64_t i = 0; i < N * (1 + K); i++) put_hidden(i);
    multiply(down.at, products, [&](int64_t i, int64_t row, int64_t R, int64_t panel, const float* sums) {
      for (int64_t r = 0; r < R; r++)
        if (!is_shared(i))
          std::memcpy(routed.at + (row + r) * D + panel * PANEL, sums + r * PANEL, columns(layer.shared.down, panel) * 4);
        else
          add_panel(batch.x, layer.shared.down, row + r, panel, sums + r * PANEL);
    });
  }

  // What is between gate and down of the shared block's tokens, then of the experts'.
  void put_hidden(int64_t i) {
    if (i < N) {
      if (planned.at[0]) mid.put(hidden.at + i * width, i, 0, N);
      return;
    }
    const int64_t e = routing.expert.at[i - N], begin = routing.begin.at[e], place = routing.place.at[i - N];
    if (planned.at[1 + e])
      routed_mid.put(hidden.at + (N + place) * width, place - begin, begin, routing.begin.at[e + 1] - begin);
  }

  void add_routed() {
    if (!layer.E) return;
#pragma omp for
    for (int64_t n = 0; n < N; n++)
      for (int64_t k = n * K; k < (n + 1) * K; k++)
        add(batch.x + n * D, routed.at + routing.place.at[k] * D, D);
  }
};

void project(const Decoder& decoder, const Layer& layer, const Batch& batch, float* qkv, int64_t threads) {
  Projection projection(decoder, layer, batch, qkv);
#pragma omp parallel num_threads(threads)
  projection.run();
}

void finish(const Decoder& decoder, const Layer& layer, const Batch& batch, const float* attended, int64_t threads) {
  Finish rest(decoder, layer, batch, attended);
#pragma omp parallel num_threads(threads)
  rest.run();
}

void* route(const Decoder& decoder, const Layer& layer, const Batch& batch, const float* attended, int32_t* tokens,
            int64_t threads) {
  Finish* rest = new Finish(decoder, layer, batch, attended);
#pragma omp parallel num_threads(threads)
  rest->route();
  for (int64_t e = 0; e < layer.E; e++) tokens[e] = rest->tokens(e);
  return rest;
}

void feed_forward(void* routed, const uint8_t* which, int64_t threads) {
  Finish& rest = *(Finish*)routed;
  rest.plan(which);
#pragma omp parallel num_threads(threads)
  rest.feed_forward();
}

void add_routed(void* routed, int64_t threads) {
  Finish* rest = (Finish*)routed;
#pragma omp parallel num_threads(threads)
  rest->add_routed();
  delete rest;
}

void attend(const Decoder& decoder, const Layer& layer, const Batch& batch, const Sequence* sequences, int64_t S,
            int64_t at, float* attended, int64_t threads) {
  Buffer<float> qkv(batch.N * (decoder.H + 2 * decoder.G) * decoder.d);
  std::memset(attended, 0, batch.N * decoder.H * decoder.d * 4);  // tokens of no sequence attend to nothing
  Projection projection(decoder, layer, batch, qkv.at);
  OwnAttention attention = {decoder, layer, sequences, S, at, qkv.at, attended};
#pragma omp parallel num_threads(threads)
  {
    projection.run();
    attention.run();
  }
}

void run(const Decoder& decoder, const Layer* layers, int64_t count, const Batch& batch, const Sequence* sequences,
         int64_t S, int64_t threads) {
  Buffer<float> qkv(batch.N * (decoder.H + 2 * decoder.G) * decoder.d), attended(batch.N * decoder.H * decoder.d);
  std::memset(attended.at, 0, batch.N * decoder.H * decoder.d * 4);  // tokens of no sequence attend to nothing
  for (int64_t at = 0; at < count; at++) {
    Projection projection(decoder, layers[at], batch, qkv.at);
    OwnAttention attention = {decoder, layers[at], sequences, S, at, qkv.at, attended.at};
    Finish rest(decoder, layers[at], batch, attended.at);
#pragma omp parallel num_threads(threads)
    {
      projection.run();
      attention.run();
      rest.run();
    }
  }
}

}  // namespace

extern const Layers HERD_NAME(layers);
const Layers HERD_NAME(layers) = {project, finish, run, attend, route, feed_forward, add_routed};

}  // namespace herd
