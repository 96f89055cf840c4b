"""What the processes of a job find in their environment."""

from __future__ import annotations

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Large tensors come and go, and each time malloc takes fresh memory from the kernel: in huge pages, one fault for
2 MiB instead of 512. glibc before 2.35 takes no notice."""
