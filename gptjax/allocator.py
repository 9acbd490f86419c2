"""The C allocator, told to keep what one step frees for the next."""

import ctypes
import platform

# Parameters of mallopt, from glibc's malloc.h, and how much a thread's heap holds (arena.c).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_HEAP_BYTES = 64 << 20


def keep_freed_memory() -> bool:
  """Makes malloc keep freed memory instead of giving it back to the system, in this process.

  XLA on CPU takes the temporary buffers of a program from malloc at every call. glibc maps large
  ones anew each time, and the system zeroes them page by page as they are touched: a third of the
  time of a step of GPT-2 124M (docs/log.md, 2026-11-26). Buffers beyond 64 MB are kept for the
  main thread alone; for other threads glibc maps them whatever it is told.

  Returns:
    Whether the C library took it; others than glibc are left as they are.
  """
  if platform.libc_ver()[0] != "glibc":
    return False
  options = {
    _MMAP_MAX: 0,  # take large blocks from the heap
    _TRIM_THRESHOLD: -1,  # never shrink the main thread's heap
    _TOP_PAD: _HEAP_BYTES,  # nor end a second heap of another thread once it is empty
  }
  mallopt = ctypes.CDLL(None).mallopt
  return all(mallopt(option, value) for option, value in options.items())
