"""Reads HDF5 files whose paths come in by lines, one answer a file: the process that may hang or die of them.

A script of its own, which imports nothing of ours: it starts in a fifth of a second. `trial.py` begins it.
"""

import contextlib
import faulthandler
import os
import signal
import sys

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5l, h5o, h5t, h5z  # pyright: ignore[reportAttributeAccessIssue]  # its types do not name them

_ADDRESSES = 4 * 2**30  # bytes
_FILTERS = (h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_LZF)
_LARGEST_ATTRIBUTE = 2**20  # bytes
_MOST = 100_000  # objects


def walk(file: h5f.FileID) -> None:
    """Read every group, attribute, index of chunks and text; no link is followed."""
    seen: set[int] = set()
    todo = [h5o.open(file, b"/")]
    while todo and len(seen) < _MOST:
        item = todo.pop()
        _attributes(item)
        if isinstance(item, h5d.DatasetID):
            _values(item)
        elif isinstance(item, h5g.GroupID):
            for name in list(item):
                if item.links.get_info(name).type == h5l.TYPE_HARD:
                    inside = h5o.open(item, name)
                    where = h5o.get_info(inside).addr
                    if where not in seen:
                        seen.add(where)
                        todo.append(inside)


def _attributes(item: h5d.DatasetID | h5g.GroupID) -> None:
    """Read those whose values lie apart, in a heap; the others came with the object."""
    for k in range(h5a.get_num_attrs(item)):
        with contextlib.suppress(KeyError, OSError, RuntimeError, TypeError, ValueError):  # whoever needs it says so
            one = h5a.open(item, index=k)
            if _apart(one.get_type()) and one.get_storage_size() <= _LARGEST_ATTRIBUTE:
                one.read(np.empty(one.shape, one.dtype))


def _apart(kind: h5t.TypeID) -> bool:
    text = isinstance(kind, h5t.TypeStringID) and kind.is_variable_str()
    return text or kind.detect_class(h5t.VLEN) or kind.detect_class(h5t.REFERENCE)


def _values(item: h5d.DatasetID) -> None:
    """Read the index of the chunks; the values, too, where they lie apart or pass a filter that few use."""
    plan = item.get_create_plist()
    if plan.get_layout() == h5d.CHUNKED:
        item.get_num_chunks()
    if plan.get_external_count() or plan.get_layout() == h5d.VIRTUAL:
        return
    odd = any(plan.get_filter(k)[0] not in _FILTERS for k in range(plan.get_nfilters()))
    if odd or _apart(item.get_type()):
        h5py.Dataset(item)[()]


def main(seconds: float) -> None:
    """Answer `yes` where a reader comes back from a file, be it with an error, and `large` where memory ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the process that asks ends this one
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    with open(os.devnull, "w") as nothing:
        for line in sys.stdin.buffer:
            faulthandler.dump_traceback_later(seconds, exit=True, file=nothing)  # also where nobody waits any more
            answer = b"yes\n"
            try:
                with h5py.File(os.fsdecode(bytes.fromhex(line.decode())), "r") as file:
                    walk(file.id)
            except MemoryError:
                answer = b"large\n"
            except Exception:  # noqa: BLE001 - the reader of the file gets it again, and says so
                pass
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(answer)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
