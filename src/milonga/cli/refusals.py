"""What to say when the file system refuses something."""

import errno

# What the file system refuses because of where the user pointed, rather than because of a fault of ours.
REFUSALS = {
    errno.EACCES: "no permission; choose another place or change its permissions",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EEXIST: "exists already; choose another place",
    errno.EFBIG: "the file would be too large for this file system or limit; choose another place",
    errno.EISDIR: "is a folder, a file was expected",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "no such file or folder",
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EROFS: "the file system is read-only; choose another place",
}
