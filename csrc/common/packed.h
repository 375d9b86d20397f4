// Packed sequences: sequence b is tokens offsets[b] .. offsets[b+1]-1 of a batch of rows; rows from offsets[B] on are
// padding. Their tiles: at most `size` tokens of one sequence.
#pragma once
#include "common/hd.h"

namespace pymathrl {

// Tile i of sequence b has the number offsets[b] / size + b + i: no counting before. The numbers of two sequences do not
// meet, because a sequence of L tokens from o on has at most (o + L) / size - o / size + 1 tiles. Some numbers name no
// tile. A sequence without tokens has one empty tile.
HD int64_t tile_numbers(int64_t tokens, int64_t sequences, int64_t size) { return tokens / size + sequences; }

HD int64_t first_tile(const int64_t* offsets, int64_t sequence, int64_t size) {
  return offsets[sequence] / size + sequence;
}

struct Tile {
  int64_t sequence, start, end;  // of the sequence, [start, end)
  int64_t first, last;           // of the tile, [first, last)
};

// False where the number names no tile.
HD bool find_tile(const int64_t* offsets, int64_t sequences, int64_t size, int64_t number, Tile* tile) {
  int64_t low = 0, high = sequences;  // the last sequence whose first tile is at most `number`: in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_tile(offsets, middle, size) <= number)
      low = middle;
    else
      high = middle;
  }
  const int64_t index = number - first_tile(offsets, low, size), start = offsets[low], end = offsets[low + 1];
  const int64_t first = start + index * size;
  *tile = {low, start, end, first, first + size < end ? first + size : end};
  return index == 0 || first < end;
}

// Zeroes the padding of [tokens,width], on a CPU; null: nothing. On a GPU: packed.cuh.
inline void clear_padding(const int64_t* offsets, int64_t sequences, int64_t tokens, void* rows, int64_t width) {
  const int64_t used = offsets[sequences];
  if (rows) memset(static_cast<float*>(rows) + used * width, 0, (tokens - used) * width * sizeof(float));
}

// Of the rows of a step on states held in place: consecutive rows of one state (or of none, -1) are a run. One starts at
// row i; the row after the last of row i's.
HD bool run_starts(const int64_t* row, int64_t i) { return i == 0 || row[i] != row[i - 1]; }
HD int64_t run_end(const int64_t* row, int64_t rows, int64_t i) {
  int64_t last = i + 1;
  while (last < rows && !run_starts(row, last)) ++last;
  return last;
}

}  // namespace pymathrl
