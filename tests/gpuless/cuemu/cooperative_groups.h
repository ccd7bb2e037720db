// In place of the toolkit's header of this name: blocks and clusters, as cuemu.h runs them.
#pragma once

namespace cooperative_groups {

struct thread_block {
  static void sync() { cuemu::sync_block(); }
  static unsigned thread_rank() { return threadIdx.x; }
  static unsigned num_threads() { return blockDim.x; }
};

struct cluster_group {
  static void sync() { cuemu::sync_cluster(); }
  static unsigned block_rank() { return cuemu::rank(); }
  static unsigned num_blocks() { return cuemu::launch_now->cluster; }
  template <class T>
  static T* map_shared_rank(T* mine, unsigned rank) {
    return static_cast<T*>(cuemu::map_shared(mine, rank));
  }
};

inline thread_block this_thread_block() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
