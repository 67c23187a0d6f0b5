// The Python bindings of the ops: they take addresses and sizes and check nothing. hdfast_kernels/native.py and the op
// files check shapes, dtypes, contiguity and lifetime; an address costs far less per call than an array protocol.
//
// The instruction set is chosen once, when the module is loaded, and can be forced (tests compare them).

#if defined(__linux__)
#include <malloc.h>
#endif

#ifdef HDFAST_HAS_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#define HDFAST_ISA generic
#include "ops.h"
#undef HDFAST_ISA
#ifdef HDFAST_HAS_avx2
#define HDFAST_ISA avx2
#include "ops.h"
#undef HDFAST_ISA
#endif
#ifdef HDFAST_HAS_avx512
#define HDFAST_ISA avx512
#include "ops.h"
#undef HDFAST_ISA
#endif
#ifdef HDFAST_HAS_amx
#define HDFAST_ISA amx
#include "ops.h"
#undef HDFAST_ISA
#endif

namespace nb = nanobind;

const char* sources_digest();

namespace {

struct Table {
  const char* name;
#define HDFAST_MEMBER(op) decltype(&generic::op) op;
  HDFAST_OPS(HDFAST_MEMBER)
  HDFAST_STRUCT_OPS(HDFAST_MEMBER)
#undef HDFAST_MEMBER
};

#define HDFAST_ENTRY(op) &HDFAST_ISA::op,
#define HDFAST_ISA generic
const Table generic_table = {"generic", HDFAST_OPS(HDFAST_ENTRY) HDFAST_STRUCT_OPS(HDFAST_ENTRY)};
#undef HDFAST_ISA
#ifdef HDFAST_HAS_avx2
#define HDFAST_ISA avx2
const Table avx2_table = {"avx2", HDFAST_OPS(HDFAST_ENTRY) HDFAST_STRUCT_OPS(HDFAST_ENTRY)};
#undef HDFAST_ISA
#endif
#ifdef HDFAST_HAS_avx512
#define HDFAST_ISA avx512
const Table avx512_table = {"avx512", HDFAST_OPS(HDFAST_ENTRY) HDFAST_STRUCT_OPS(HDFAST_ENTRY)};
#undef HDFAST_ISA
#endif
#ifdef HDFAST_HAS_amx
#define HDFAST_ISA amx
const Table amx_table = {"amx", HDFAST_OPS(HDFAST_ENTRY) HDFAST_STRUCT_OPS(HDFAST_ENTRY)};
#undef HDFAST_ISA
#endif

#if defined(HDFAST_HAS_avx512) || defined(HDFAST_HAS_amx)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}
#endif

#ifdef HDFAST_HAS_amx
// Whether the processor can multiply bfloat16 tiles and the system lets this process use them.
bool has_amx() {
  unsigned a, b, c, d = 0;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (amx_bf16 | amx_tile)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// What this machine can run, slowest first.
std::vector<const Table*> runnable() {
  std::vector<const Table*> tables = {&generic_table};
#ifdef HDFAST_HAS_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    tables.push_back(&avx2_table);
#endif
#ifdef HDFAST_HAS_avx512
  if (has_avx512()) tables.push_back(&avx512_table);
#endif
#ifdef HDFAST_HAS_amx
  if (has_avx512() && has_amx()) tables.push_back(&amx_table);
#endif
  return tables;
}

const Table* ops = runnable().back();

// Tells glibc's allocator to keep freed memory instead of returning it to the system. False without glibc.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1 && mallopt(M_TOP_PAD, 64 << 20) == 1;
#else
  return false;
#endif
}

// How Python passes an argument: a pointer as its address, a list of pointers as a list of addresses.
template <class T>
struct Wire {
  using type = T;
  static T unwrap(T value) { return value; }
};
template <class T>
struct Wire<T*> {
  using type = uintptr_t;
  static T* unwrap(uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <class T>
struct Wire<T* const*> {
  using type = std::vector<uintptr_t>;
  static T* const* unwrap(const std::vector<uintptr_t>& addresses) {
    return reinterpret_cast<T* const*>(addresses.data());
  }
};

// The op of the instruction set in use, called without the interpreter's lock.
template <class Result, class... Args>
auto call(Result (*Table::*op)(Args...)) {
  return [op](typename Wire<Args>::type... args) -> Result {
    nb::gil_scoped_release release;
    return (ops->*op)(Wire<Args>::unwrap(args)...);
  };
}

// Addresses and sizes by name; KeyError if one is missing, TypeError if there are more than expected.
template <bool backward>
RssmObserve rssm_observe_fields(const nb::kwargs& given) {
  RssmObserve p = {};
  size_t count = 0;
#define HDFAST_SIZE(name) p.name = nb::cast<int64_t>(given[#name]), count++;
#define HDFAST_ADDRESS(type, name) p.name = Wire<type*>::unwrap(nb::cast<uintptr_t>(given[#name])), count++;
  RSSM_OBSERVE_SIZES(HDFAST_SIZE)
  RSSM_OBSERVE_WEIGHTS(HDFAST_ADDRESS)
  RSSM_OBSERVE_STATE(HDFAST_ADDRESS)
  if constexpr (backward) {
    RSSM_OBSERVE_BACKWARD(HDFAST_ADDRESS)
  } else {
    RSSM_OBSERVE_FORWARD(HDFAST_ADDRESS)
  }
#undef HDFAST_SIZE
#undef HDFAST_ADDRESS
  if (count != given.size()) throw nb::type_error("rssm_observe: a field that does not exist");
  return p;
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("__doc__") = "C++ ops of hdfast_kernels; call them through the op files.";
  m.def("isa", [] { return std::string(ops->name); }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Table* table : runnable()) names.push_back(table->name);
        return names;
      },
      "The instruction sets that are compiled in and that this machine runs.");
  m.def(
      "force_isa",
      [](const std::string& name) {
        for (const Table* table : runnable())
          if (name == table->name) {
            ops = table;
            return;
          }
        throw std::invalid_argument("instruction set '" + name + "' is not compiled in or not supported here");
      },
      nb::arg("name"), "Use this instruction set from now on; ValueError if it cannot run here.");

  m.def(
      "is_intel",
      [] {
#if defined(__x86_64__)
        return bool(__builtin_cpu_is("intel"));
#else
        return false;
#endif
      },
      "Whether Intel made the processor.");

  m.attr("sources") = sources_digest();

  m.def("keep_freed_memory", &keep_freed_memory, "See hdfast_kernels.native.keep_freed_memory.");

#define HDFAST_DEFINE(op) m.def(#op, call(&Table::op));
  HDFAST_OPS(HDFAST_DEFINE)
#undef HDFAST_DEFINE

  m.def("rssm_observe_forward", [](double unimix, float eps, int threads, const nb::kwargs& given) {
    RssmObserve p = rssm_observe_fields<false>(given);
    p.unimix = unimix, p.eps = eps;
    nb::gil_scoped_release release;
    ops->rssm_observe_forward(p, threads);
  });
  m.def("rssm_observe_backward", [](double unimix, float eps, int threads, const nb::kwargs& given) {
    RssmObserve p = rssm_observe_fields<true>(given);
    p.unimix = unimix, p.eps = eps;
    nb::gil_scoped_release release;
    ops->rssm_observe_backward(p, threads);
  });
}
