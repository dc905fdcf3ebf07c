"""How processes that train on a CPU are to keep memory."""

from __future__ import annotations

# For the environment variable GLIBC_TUNABLES, which glibc reads when a process starts. By default it gives every large tensor
# back to the kernel when it is freed, and the next one costs page faults again. Kept, and in huge pages where the kernel has
# them, the same memory serves the next step; the peak hardly changes.
MALLOC_TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        f"glibc.malloc.trim_threshold={2**34}",
    )
)
