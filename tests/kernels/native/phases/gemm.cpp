// Matmuls with weights of every form, prepared and multiplied as an operator does it, and the epilogue of a library's.
#include "epilogue.h"
#include "weights.h"

namespace river::checks {
namespace {

struct Product {
  PrepareArgs prepare{};
  GemmArgs gemm{};  // whose `unpacked`, if any, is that of the first of several copies
};

enum Form {
  kInt4,
  kInt4Wanted,
  kInt4Experts,
  kDense32,
  kDense16,
  kDenseHalf,
  k12Bits,
  kMxfp4,
  kTransposed,
  kInt8Rows,
  kInt8Groups,
  kFloat8
};

void run_product(Case& c, Product& p, int parts) {
  c.run(&Kernels::prepare, &p.prepare, parts);
  const Pieces none{}, &pieces = p.gemm.unpacked ? *p.gemm.unpacked : none;
  std::fill(pieces.flags, pieces.flags + pieces.count, 0);
  c.run(&Kernels::gemm, &p.gemm, parts);
  c.expect(std::count(pieces.flags, pieces.flags + pieces.count, 0) == pieces.count, "a part kept its piece of memory");
}

// Whether blocks of weights are made in memory.
bool is_unpacked(Form form) { return form == k12Bits || form == kMxfp4 || form == kTransposed; }

// Pieces of memory, exactly as much as a matmul of such weights takes.
Pieces pieces_for(Case& c, const GemmArgs& a) {
  Pieces pieces{nullptr, c.random.between(1, 4), a.unpacked_bytes()};
  pieces.flags = c.workspace(pieces.bytes()).data<int32_t>();
  return pieces;
}

// The memory for the activations of all rows.
void place(Case& c, Product& p) {
  p.gemm.x = activations_of(c, p.gemm.rows, p.gemm.in_features, p.gemm.group_size, p.gemm.x.format);
  p.prepare.out = p.gemm.x;
}

int32_t draw_dtype(Case& c, Form form) {
  if (form == kDense32) return kFloat32;
  if (form == kDense16 || form == k12Bits || form == kMxfp4) return kBFloat16;
  return form == kDenseHalf ? kFloat16 : c.random.dtype();
}

// Draws sizes, x and the format of its activations.
Product draw_product(Case& c, Form form) {
  Random& r = c.random;
  Product p;
  GemmArgs& a = p.gemm;
  const bool is_long = form == k12Bits && r.one_in(4);  // more features than a few rows meet in one stretch
  const bool is_tall = !is_long && r.one_in(12);        // more rows than meet a block of weights together
  const int most = is_tall ? 40 : 330;
  a.rows = is_tall ? r.between(257, 300) : r.one_in(3) ? r.between(9, 70) : r.between(1, 8);
  a.in_features = form == kInt8Groups || form == kMxfp4 ? 32 * r.between(1, 11)
                  : is_long                             ? r.between(1000, 1500)
                                                        : r.between(1, most);
  a.group_size = form <= kInt4Experts ? r.pick({32, 64, 128}) : kLargestGroup;
  a.epilogue.out_features = r.one_in(3) ? 32 * r.between(1, 3) : r.between(1, is_long || is_tall ? 40 : 90);
  a.epilogue.dtype = draw_dtype(c, form);
  const bool is_bfloat16 = form == kDense16 || is_unpacked(form);
  a.x.format = form <= kInt4Experts ? kInt8 : is_bfloat16 ? c.kernels.bfloat16 : kFloats;
  if (form == kMxfp4 || form == kTransposed)
    a.x.format = a.epilogue.dtype == kBFloat16 ? c.kernels.rows_of_bfloat16 : kFloats;
  const int64_t k = a.in_features, stride = k + r.pick({0, 5});
  PrepareArgs& x = p.prepare;
  x.x = {c.normal(a.rows, k, stride, a.epilogue.dtype, r.pick({0.1, 1.0})).data(), stride};
  x.dtype = a.epilogue.dtype;
  x.rows = a.rows;
  x.in_features = a.in_features;
  x.group_size = a.group_size;
  c.describe("M=", a.rows, " N=", a.epilogue.out_features, " K=", k, " group=", a.group_size);
  return p;
}

// Adds the products of row `row` of x [M, K] and all rows of `w` [N, K].
void add_products(const Doubles& x, const Doubles& w, int64_t row, int64_t k, int64_t n_all, Sums& sums) {
  for (int64_t n = 0; n < n_all; ++n)
    for (int64_t i = 0; i < k; ++i) {
      const double product = x[row * k + i] * w[n * k + i];
      sums.values[row * n_all + n] += product;
      sums.magnitudes[row * n_all + n] += std::fabs(product);
    }
}

// The sums of a product whose rows meet the weights number `expert[row]`, or the only ones; zeros for other numbers.
Sums expected_of(const Product& p, const std::vector<Weights>& weights) {
  const int64_t rows = p.gemm.rows, k = p.gemm.in_features, n = p.gemm.epilogue.out_features;
  const Doubles x = doubles_of(p.prepare.x, rows, k, p.prepare.dtype);
  const Doubles rounded = p.gemm.x.format == kInt8 ? in_8_bits(x, k, p.gemm.group_size) : Doubles();
  Sums sums{Doubles(rows * n), Doubles(rows * n)};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t number = p.gemm.expert ? p.gemm.expert[row] : 0;
    if (number < 0 || number >= int64_t(weights.size())) continue;
    add_products(x, weights[number].values, row, k, n, sums);
    if (!rounded.empty()) add_products(rounded, weights[number].steps, row, k, n, sums);
  }
  return sums;
}

// Computes the first row, the last one and one between them each alone, and compares their bits.
void expect_rows_alone(Case& c, const Product& whole) {
  const int64_t size = size_of(whole.gemm.epilogue.dtype), width = whole.gemm.epilogue.width();
  for (const int row : {0, whole.gemm.rows / 2, whole.gemm.rows - 1}) {
    Product p = whole;
    Epilogue& e = p.gemm.epilogue;
    p.gemm.rows = p.prepare.rows = 1;
    p.prepare.x.data = static_cast<char*>(p.prepare.x.data) + row * p.prepare.x.stride * size;
    if (e.residual.data) e.residual.data = static_cast<char*>(e.residual.data) + row * e.residual.stride * size;
    if (p.gemm.expert) p.gemm.expert += row;
    e.y.data = c.output(width, e.dtype).data();
    place(c, p);
    run_product(c, p, 1);
    const auto* y = static_cast<const char*>(whole.gemm.epilogue.y.data) + row * whole.gemm.epilogue.y.stride * size;
    c.expect_same_bits("a row's bits depend on the other rows", e.y.data, y, width * size);
  }
}

// Packed and transposed weights give the bits of the same weights in rows.
void expect_bits_of_dense(Case& c, const Product& packed, const Rows& dense) {
  Product p = packed;
  Epilogue& e = p.gemm.epilogue;
  p.gemm.palette = nullptr;
  p.gemm.exponents = nullptr;
  p.gemm.weight = nullptr;
  p.gemm.transposed = 0;
  p.gemm.dense = dense;
  const int64_t size = size_of(e.dtype), values = (p.gemm.rows - 1) * e.y.stride + e.width();
  e.y.data = c.output(values, e.dtype).data();
  place(c, p);
  run_product(c, p, 1);
  c.expect_same_bits("weights have other bits than the same ones in rows", e.y.data, packed.gemm.epilogue.y.data,
                     values * size);
}

void check_form(Case& c, Form form) {
  Product p = draw_product(c, form);
  GemmArgs& a = p.gemm;
  const int32_t n = a.epilogue.out_features;
  const bool is_dense = form == kDense32 || form == kDense16 || form == kDenseHalf;
  const std::vector<int32_t> first = is_dense ? draw_matrices(c, n) : std::vector<int32_t>{0, n};
  std::vector<Weights> weights;
  Rows dense{};
  if (form == kInt4) weights = pack_int4(c, a, {true});
  if (is_dense) weights = {pack_dense(c, a, first)};
  if (form == k12Bits) weights = pack_12_bits(c, a, {true}, dense);
  if (form == kMxfp4) weights = pack_mxfp4(c, a, {true}, dense);
  if (form == kTransposed) weights = pack_transposed(c, a, {true}, dense);
  if (form >= kInt8Rows) {
    a.in_8_bits = form == kFloat8 ? kFloat8s : kInt8s;
    a.grouped = form == kInt8Groups;
    weights = {pack_8_bits(c, a)};
  }
  const Pieces pieces = is_unpacked(form) ? pieces_for(c, a) : Pieces{};
  if (is_unpacked(form)) a.unpacked = &pieces;
  draw_epilogue(c, a.epilogue, a.rows, first);
  place(c, p);
  c.describe(" matrices=", int64_t(first.size() - 1));
  c.repeat([&](int parts) { run_product(c, p, parts); });
  expect_epilogue(c, a.epilogue, a.rows, expected_of(p, weights));
  expect_rows_alone(c, p);
  if (is_unpacked(form)) expect_bits_of_dense(c, p, dense);
}

// Adds each expert's bias to the sums of its rows.
void add_biases(const GemmArgs& a, Sums& sums) {
  const Epilogue& e = a.epilogue;
  for (int64_t row = 0; e.bias.count && row < a.rows; ++row)
    for (int64_t n = 0; a.expert[row] >= 0 && a.expert[row] < a.experts && n < e.out_features; ++n) {
      const double bias = value_of(e.bias.data[0], a.expert[row] * e.out_features + n, e.dtype);
      sums.values[row * e.out_features + n] += bias;
      sums.magnitudes[row * e.out_features + n] += std::fabs(bias);
    }
}

// Neighbors share an expert, or have numbers that no expert has.
void check_experts(Case& c, Form form) {
  Random& r = c.random;
  Product p = draw_product(c, form);
  GemmArgs& a = p.gemm;
  Epilogue& e = a.epilogue;
  if (a.x.format == c.kernels.bfloat16) a.x.format = c.kernels.rows_of_bfloat16;
  std::vector<bool> used(r.between(1, 4));
  const int none = int(used.size());
  auto* const expert = c.input_of(8 * a.rows).data<int64_t>();
  for (int row = 0; row < a.rows; ++row) {
    expert[row] = row > 0 && r.one_in(2) ? expert[row - 1] : r.between(-1, none);
    if (expert[row] >= 0 && expert[row] < none) used[expert[row]] = true;
  }
  Rows dense{};
  const std::vector<Weights> weights = form == k12Bits        ? pack_12_bits(c, a, used, dense)
                                       : form == kMxfp4       ? pack_mxfp4(c, a, used, dense)
                                       : form == kTransposed  ? pack_transposed(c, a, used, dense)
                                       : form == kInt4Experts ? pack_int4(c, a, used)
                                                              : pack_dense_experts(c, a, used);
  const Pieces pieces = is_unpacked(form) ? pieces_for(c, a) : Pieces{};
  if (is_unpacked(form)) a.unpacked = &pieces;
  a.expert = expert;
  draw_epilogue(c, e, a.rows, {0, e.out_features}, {.residual = false, .bias = false, .pairs = true});
  const int64_t biases = int64_t(a.experts) * e.out_features;
  if (r.one_in(2)) e.bias = {{c.normal(1, biases, 0, e.dtype).data()}, {0, e.out_features}, 1};
  c.describe(" experts=", a.experts, " stacked biases=", e.bias.count);
  place(c, p);
  c.repeat([&](int parts) { run_product(c, p, parts); });
  Sums sums = expected_of(p, weights);
  add_biases(a, sums);
  Epilogue without_bias = e;
  without_bias.bias.count = 0;
  expect_epilogue(c, without_bias, a.rows, sums);
  expect_rows_alone(c, p);
  if (is_unpacked(form)) expect_bits_of_dense(c, p, dense);
}

// Blocks that are not listed become kMaskedLogit; the others have the bits of the whole product.
void check_vocab_blocks(Case& c) {
  Random& r = c.random;
  Product p = draw_product(c, kInt4Wanted);
  GemmArgs& a = p.gemm;
  Epilogue& e = a.epilogue;
  e.out_features = r.between(1, 150);
  const std::vector<Weights> weights = pack_int4(c, a, {true});
  draw_epilogue(c, e, a.rows, {0, e.out_features}, {false, false, true});
  place(c, p);
  c.repeat([&](int parts) { run_product(c, p, parts); });
  expect_epilogue(c, e, a.rows, expected_of(p, weights));
  Product some = p;
  const int blocks = int(e.blocks());
  std::vector<bool> is_listed(blocks);
  auto* const listed = c.input_of(4 * (1 + blocks)).data<int32_t>();
  listed[0] = 0;
  for (int block = 0; block < blocks; ++block)
    if (r.one_in(3) || (block + 1 == blocks && listed[0] == 0)) {
      listed[++listed[0]] = block;
      is_listed[block] = true;
    }
  some.gemm.vocab_blocks = listed;
  some.gemm.epilogue.y.data = c.output((a.rows - 1) * e.y.stride + e.out_features, e.dtype).data();
  c.repeat([&](int parts) {
    run_product(c, p, parts);
    run_product(c, some, parts);
  });
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t n = 0; n < e.out_features; ++n) {
      const double found = value_of(some.gemm.epilogue.y.data, row * e.y.stride + n, e.dtype);
      const double whole = value_of(e.y.data, row * e.y.stride + n, e.dtype);
      c.expect_near("y", row * e.y.stride + n, found, is_listed[n / kBlock] ? whole : double(kMaskedLogit), 0);
    }
}

void check_library_epilogue(Case& c) {
  Random& r = c.random;
  LibraryEpilogueArgs a{};
  Epilogue& e = a.epilogue;
  a.rows = r.between(1, 20);
  e.dtype = r.dtype();
  e.out_features = r.one_in(2) ? 32 * r.between(1, 40) : r.between(1, 1300);
  const std::vector<int32_t> first = draw_matrices(c, e.out_features);
  a.product.count = int32_t(first.size()) - 1;
  Sums sums{Doubles(a.rows * int64_t(e.out_features)), {}};
  for (int i = 0; i <= a.product.count; ++i) a.product.first[i] = first[i];
  for (int i = 0; i < a.product.count; ++i) {
    const int64_t width = first[i + 1] - first[i];
    Values& product = c.normal(a.rows, width, width, e.dtype);
    a.product.data[i] = product.data();
    for (int64_t j = 0; j < a.rows * width; ++j)
      sums.values[j / width * e.out_features + first[i] + j % width] = product.at(j);
  }
  for (const double x : sums.values) sums.magnitudes.push_back(std::fabs(x));
  c.describe("M=", a.rows, " N=", e.out_features, " matrices=", a.product.count);
  draw_epilogue(c, e, a.rows, first, {true, true, false});
  c.repeat([&](int parts) { c.run(&Kernels::gemm_epilogue, &a, parts); });
  expect_epilogue(c, e, a.rows, sums);
}

}  // namespace

std::vector<Check> gemm_checks() {
  const auto of = [](Form form) { return [form](Case& c) { check_form(c, form); }; };
  const auto experts_of = [](Form form) { return [form](Case& c) { check_experts(c, form); }; };
  const std::vector<Entry> entries{&Kernels::gemm};
  return {
      {"gemm 4-bit", entries, 100, of(kInt4)},
      {"gemm 4-bit, vocab_blocks", entries, 20, check_vocab_blocks},
      {"gemm 4-bit, experts", entries, 40, experts_of(kInt4Experts)},
      {"gemm float32, experts", entries, 16, experts_of(kDense32)},
      {"gemm bfloat16, experts", entries, 30, experts_of(kDense16)},
      {"gemm 12-bit, experts", entries, 30, experts_of(k12Bits)},
      {"gemm MXFP4, experts", entries, 40, experts_of(kMxfp4)},
      {"gemm transposed, experts", entries, 40, experts_of(kTransposed)},
      {"gemm float32", entries, 24, of(kDense32)},
      {"gemm bfloat16", entries, 60, of(kDense16)},
      {"gemm float16", entries, 24, of(kDenseHalf)},
      {"gemm bfloat16, 12-bit", entries, 50, of(k12Bits)},
      {"gemm bfloat16, MXFP4", entries, 50, of(kMxfp4)},
      {"gemm transposed", entries, 40, of(kTransposed)},
      {"gemm int8, by row", entries, 24, of(kInt8Rows)},
      {"gemm int8, by group", entries, 24, of(kInt8Groups)},
      {"gemm float8", entries, 24, of(kFloat8)},
      {"gemm_epilogue", {&Kernels::gemm_epilogue}, 20, check_library_epilogue},
  };
}

}  // namespace river::checks
