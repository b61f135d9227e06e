# Part of core.pyx: which piece of memory a result gets.


@cython.final
cdef class Storage:
    """A piece of a graph's memory."""

    cdef int chunk
    cdef size_t offset
    cdef size_t size
    cdef size_t last  # the last node that touches it


@cython.final
cdef class Planner:
    """Hands out pieces of chunks (future buffers), best fit first; chunks grow up to `largest` bytes."""

    cdef size_t largest
    cdef list ends  # bytes of each chunk
    cdef list gaps  # for each chunk, the free [offset, size] below its end, sorted

    def __init__(self, largest):
        self.largest = largest
        self.ends = []
        self.gaps = []

    cdef Storage take(self, size_t size):
        cdef Storage storage = Storage.__new__(Storage)
        storage.size = size
        best = None
        for chunk, gaps in enumerate(self.gaps):
            for position, gap in enumerate(gaps):
                if gap[1] >= size and (best is None or gap[1] < best[0]):
                    best = (gap[1], chunk, position)
        if best is not None:
            storage.chunk = best[1]
            gap = self.gaps[best[1]][best[2]]
            storage.offset = gap[0]
            gap[0] += size
            gap[1] -= size
            if gap[1] == 0:
                del self.gaps[best[1]][best[2]]
            return storage
        for chunk, end in enumerate(self.ends):
            # the gap at the end of a chunk grows with it
            gaps = self.gaps[chunk]
            start = gaps[-1][0] if gaps and gaps[-1][0] + gaps[-1][1] == end else end
            if start + size <= self.largest:
                if start != end:
                    gaps.pop()
                self.ends[chunk] = start + size
                storage.chunk = chunk
                storage.offset = start
                return storage
        self.ends.append(size)
        self.gaps.append([])
        storage.chunk = len(self.ends) - 1
        storage.offset = 0
        return storage

    cdef int give_back(self, Storage storage) except -1:
        gaps = self.gaps[storage.chunk]
        position = 0
        while position < len(gaps) and gaps[position][0] < storage.offset:
            position += 1
        gaps.insert(position, [storage.offset, storage.size])
        if position + 1 < len(gaps) and gaps[position][0] + gaps[position][1] == gaps[position + 1][0]:
            gaps[position][1] += gaps[position + 1][1]
            del gaps[position + 1]
        if position > 0 and gaps[position - 1][0] + gaps[position - 1][1] == gaps[position][0]:
            gaps[position - 1][1] += gaps[position][1]
            del gaps[position]
        return 0

    def sizes(self):
        return self.ends
