// SPDX-License-Identifier: MIT
// A main function that calls entries, for a process that a sanitizer may end. A call on standard input is, in numbers
// of 64 bits: order and seed of the schedule; the length of the entry's name, and the name; how many whole numbers, and
// they; how many real ones, and they; how many buffers, and for each its size (-1: a null pointer), its distance from a
// multiple of 16 bytes, and its bytes. The answer is the length of the error's text, the text, and all buffers.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {
void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::_Exit(99);
}
int64_t read_number() {
  int64_t n;
  read(&n, 8);
  return n;
}
template <class T>
std::vector<T> read_list() {
  std::vector<T> list(static_cast<size_t>(read_number()));
  read(list.data(), list.size() * sizeof(T));
  return list;
}
}  // namespace

int main() {
  int64_t order;
  while (std::fread(&order, 8, 1, stdin) == 1) {
    reinterpret_cast<void (*)(int64_t, int64_t)>(dlsym(nullptr, "schedule"))(order, read_number());
    const std::vector<char> name = read_list<char>();
    const std::vector<int64_t> n = read_list<int64_t>();
    const std::vector<double> f = read_list<double>();
    std::vector<std::pair<char*, int64_t>> buffers(static_cast<size_t>(read_number()));
    std::vector<void*> p;
    for (auto& [start, size] : buffers) {
      size = read_number();
      const int64_t off = read_number();
      // An allocation that ends where the tensor ends, so that AddressSanitizer sees a read past it.
      start = size < 0 ? nullptr : static_cast<char*>(std::malloc(size_t(off + size))) + off;
      p.push_back(start);
      if (size < 0) size = 0;
      else read(start, size_t(size));
    }
    using Entry = const char* (*)(const int64_t*, const double*, void* const*);
    const auto entry = reinterpret_cast<Entry>(dlsym(nullptr, std::string(name.begin(), name.end()).c_str()));
    if (!entry) return 98;
    const char* error = entry(n.data(), f.data(), p.data());
    const int64_t length = error ? int64_t(std::strlen(error)) : 0;
    std::fwrite(&length, 8, 1, stdout);
    if (length) std::fwrite(error, 1, size_t(length), stdout);
    for (const auto& [start, size] : buffers) std::fwrite(start, 1, size_t(size), stdout);
    std::fflush(stdout);
  }
  return 0;
}
