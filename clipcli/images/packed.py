"""The pictures in archives: which members are pictures, and the one that a name such as `photos.tar::cat.jpg` means.

In: an archive's path, as the walk meets it, or a member's name as rows have it. Out: a `Source` with the member's
bytes, or a `Failure`. A member is a picture by the same rules as a file in a folder. It parses no archive
(`archives`) and decodes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from clipcli.images.archives import Member, Wanted, inside, members
from clipcli.images.find import named_like_a_picture, sniff
from clipcli.records import Failure, FailureKind, Source


def pictures(path: str, wanted: Wanted, pass_over: Callable[[], None]) -> Iterator[Source | Failure]:
    """The archive's pictures among the members that are `wanted`, in its order; others are told to `pass_over`.

    A member that is named like a picture and can't be read is a Failure, and so is an archive that is damaged, after
    what could be read of it.
    """

    def known(name: str, head: bytes) -> bool:
        found = named_like_a_picture(name) or sniff(head) is not None
        if not found:
            pass_over()
        return found

    for item in members(path, wanted, known=known, every=True):
        if isinstance(item, Member):
            yield _source(path, item)
        elif item.path == path or named_like_a_picture(item.path):
            yield item
        else:
            pass_over()


class Lookup:
    """Members of one archive by their names.

    It looks on from where the last one stood, and then from the start: names in the archive's order, as an earlier
    run wrote them, cost one pass and no memory.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._name = ""
        self._items: Iterator[Member | Failure] = iter(())

    def find(self, name: str) -> Source | Failure:
        """The member, whatever it holds. Of several that have this name, the next."""
        self._name = name
        missing = Failure(inside(self.path, name), FailureKind.MISSING, "the archive has no such member")
        for _ in range(2):
            for item in self._items:
                if isinstance(item, Member):
                    return _source(self.path, item)
                if item.path != self.path:
                    return item
                missing = Failure(missing.path, item.kind, item.message)  # the archive's own, and its last
            self._items = members(self.path, lambda found: found == self._name, every=True)
        return missing


def _source(path: str, member: Member) -> Source | Failure:
    name = inside(path, member.name)
    if "\0" in name:  # no list could hold it
        return Failure(name, FailureKind.UNSUPPORTED, "its name holds a NUL byte")
    return Source(name, member.data)
