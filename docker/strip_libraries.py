"""Takes the names of functions, which only debuggers read, out of the compiled modules in a folder.

`strip` breaks some libraries whose headers were rewritten when their wheel was made: their segments are no longer where the
loader wants them. What would not load is left as it was.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

LOAD = 1


def main(folder: Path) -> None:
    """Strips every shared library below the folder."""
    for library in sorted(folder.rglob("*.so*")):
        if library.is_symlink() or library.read_bytes()[:4] != b"\x7fELF":
            continue
        stripped = library.with_name(f"{library.name}.stripped")
        done = subprocess.run(["strip", "--strip-unneeded", "-o", str(stripped), str(library)], check=False)
        if done.returncode == 0 and loads(stripped.read_bytes()):
            stripped.chmod(library.stat().st_mode)
            stripped.replace(library)
        else:
            stripped.unlink(missing_ok=True)


def loads(elf: bytes) -> bool:
    """Whether each segment that the loader maps lies at the same place within a page in the file and in memory."""
    (start,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for number in range(count):
        kind, _, offset, address, _, _, _, align = struct.unpack_from("<IIQQQQQQ", elf, start + number * size)
        if kind == LOAD and align > 1 and offset % align != address % align:
            return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]))
