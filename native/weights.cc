// Machine::load_weights: one packed copy per weight, in the order in which a cycle first reads
// them.

#include <algorithm>
#include <cmath>

#include "machine.h"

namespace lmclock {

namespace {

using isa::Op;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One matrix to pack: a weight, or one expert's rows of it.
struct Job {
  int32_t weight;
  const uint8_t* rows;
  Matrix matrix;
  int64_t offset;  // in the packed memory
};

// Plans the packed memory: gate and up panels alternate, since glu reads them side by side.
class Layouter {
 public:
  explicit Layouter(const ProgramSource& source) : source_(source), seen_(source.weights.size()) {
    for (const SectionSource& section : source.sections)
      for (int64_t n = 0; n < section.instructions; ++n) add(section.code[n]);
  }

  std::vector<Job> jobs;
  int64_t bytes = 0;

 private:
  const WeightSource& weight(int32_t n) const { return source_.weights[static_cast<size_t>(n)]; }

  int64_t panel_stride(int32_t n) const {
    return round_up(panel_bytes(layout_of(weight(n).format), weight(n).width), kAlign);
  }

  void add(const isa::Instruction& i) {
    const Op op = static_cast<Op>(i.op);
    if (op == Op::norm) return;
    const int32_t parts = op == Op::experts ? i.experts : 1;
    if (op == Op::glu || op == Op::experts) add_pair(i.weights[0], i.weights[1], parts);
    for (int32_t n : i.weights)
      if (n >= 0 && !seen_[static_cast<size_t>(n)]) {
        const int64_t stride = panel_stride(n);
        place(n, parts, bytes, stride);
        bytes += parts * panels_of(weight(n).rows / parts) * stride;
      }
  }

  void add_pair(int32_t a, int32_t b, int32_t parts) {
    const bool same = weight(a).rows == weight(b).rows && weight(a).width == weight(b).width;
    if (a == b || !same || seen_[static_cast<size_t>(a)] || seen_[static_cast<size_t>(b)]) return;
    const int64_t first = panel_stride(a), stride = first + panel_stride(b);
    place(a, parts, bytes, stride);
    place(b, parts, bytes + first, stride);
    bytes += parts * panels_of(weight(a).rows / parts) * stride;
  }

  void place(int32_t n, int32_t parts, int64_t offset, int64_t stride) {
    seen_[static_cast<size_t>(n)] = 1;
    const WeightSource& w = weight(n);
    const int64_t outputs = w.rows / parts;
    for (int64_t e = 0; e < parts; ++e) {
      const Matrix m = {nullptr, outputs, w.width, stride, layout_of(w.format)};
      jobs.push_back({n, w.data + e * outputs * w.row_bytes, m,
                      offset + e * panels_of(outputs) * stride});
    }
  }

  const ProgramSource& source_;
  std::vector<uint8_t> seen_;
};

[[noreturn]] void refuse(const WeightSource& w) {
  throw Failure{"FileError", "tensor " + w.name + " holds a number that is not finite"};
}

// Panels of one piece of work: small enough to share out evenly, large enough that giving its pages
// back, of which every processor is told, costs little (256 KB: 3 ms of 100 MB).
constexpr int64_t kPieceBytes = 1024 * 1024;

void pack_all(Team& team, const Kernels& kernels, const ProgramSource& source,
              const std::vector<Job>& jobs) {
  struct Piece {
    const Job* job;
    int64_t first, last;
  };
  std::vector<Piece> pieces;
  for (const Job& job : jobs) {
    const int64_t stride = std::max<int64_t>(job.matrix.panel_stride, 1);
    const int64_t step = std::max<int64_t>(1, kPieceBytes / stride);
    const int64_t panels = panels_of(job.matrix.outputs);
    for (int64_t p = 0; p < panels; p += step)
      pieces.push_back({&job, p, std::min(p + step, panels)});
  }
  std::atomic<size_t> next{0};
  std::atomic<int32_t> bad{-1};
  team.run([&](int) {
    for (size_t n = next.fetch_add(1); n < pieces.size(); n = next.fetch_add(1)) {
      const Piece& piece = pieces[n];
      const Matrix& m = piece.job->matrix;
      const WeightSource& w = source.weights[static_cast<size_t>(piece.job->weight)];
      if (!kernels.pack(w.format, piece.job->rows, m.outputs, m.width, const_cast<uint8_t*>(m.data),
                        m.panel_stride, piece.first, piece.last))
        bad.store(piece.job->weight);
      const int64_t end = std::min(piece.last * kPanel, m.outputs);
      if (w.mapped)  // now, so that the weights are never in memory twice
        give_back(piece.job->rows + piece.first * kPanel * w.row_bytes,
                  piece.job->rows + end * w.row_bytes);
    }
  });
  if (bad.load() >= 0) refuse(source.weights[static_cast<size_t>(bad.load())]);
}

}  // namespace

void Machine::load_weights(const ProgramSource& source) {
  weights_.assign(source.weights.size(), {});
  parts_.assign(source.weights.size(), {});
  vectors_.assign(source.weights.size(), {});
  for (size_t n = 0; n < source.weights.size(); ++n) {
    const WeightSource& w = source.weights[n];
    weights_[n].rows = w.rows;
    weights_[n].width = w.width;
    if (!w.vector) continue;
    vectors_[n].assign(w.vector, w.vector + w.rows * w.width);
    for (float x : vectors_[n])
      if (!std::isfinite(x)) refuse(w);
    vectors_[n].resize(vectors_[n].size() + 16);  // the last vector may be read whole
    weights_[n].vector = vectors_[n].data();
  }
  Layouter layout(source);
  packed_ = Memory();  // given back before the new one is there
  packed_ = prepared_.take(layout.bytes);
  for (Job& job : layout.jobs) {
    job.matrix.data = packed_.data() + job.offset;
    parts_[static_cast<size_t>(job.weight)].push_back(job.matrix);
  }
  pack_all(team_, *frame_.kernels, source, layout.jobs);
  for (size_t n = 0; n < parts_.size(); ++n)
    if (!parts_[n].empty()) {
      weights_[n].matrix = parts_[n].front();
      weights_[n].parts = parts_[n].data();
    }
}

}  // namespace lmclock
