#include "agl_grpc/stop.hpp"

#include <condition_variable>
#include <map>
#include <mutex>

namespace agl_grpc {

struct Stop::State {
  std::mutex mutex;
  std::condition_variable changed;
  std::recursive_mutex calling;  // a listener that ends waits for its call, and may end within another's
  bool requested = false;
  long next = 0;
  std::map<long, std::function<void()>> listeners;
};

Stop::Stop() : state_(std::make_shared<State>()) {}

Stop Stop::child_of(const Stop& parent) {
  Stop child;
  std::weak_ptr<State> weak = child.state_;
  child.parent_ = std::make_shared<Listener>(parent.listen([weak] {
    if (auto state = weak.lock()) {
      Stop same;
      same.state_ = state;
      same.request();
    }
  }));
  return child;
}

void Stop::request() const {
  auto state = state_;
  std::lock_guard calling(state->calling);
  std::map<long, std::function<void()>> listeners;
  {
    std::lock_guard lock(state->mutex);
    if (state->requested) return;
    state->requested = true;
    state->changed.notify_all();
  }
  for (;;) {  // one by one: a listener may have ended meanwhile
    std::function<void()> call;
    {
      std::lock_guard lock(state->mutex);
      if (state->listeners.empty()) return;
      call = std::move(state->listeners.begin()->second);
      state->listeners.erase(state->listeners.begin());
    }
    call();
  }
}

bool Stop::requested() const {
  std::lock_guard lock(state_->mutex);
  return state_->requested;
}

bool Stop::wait_for(std::chrono::nanoseconds limit) const {
  std::unique_lock lock(state_->mutex);
  return state_->changed.wait_for(lock, limit, [this] { return state_->requested; });
}

Stop::Listener Stop::listen(std::function<void()> call) const {
  long key = -1;
  {
    std::lock_guard lock(state_->mutex);
    if (!state_->requested) {
      key = state_->next++;
      state_->listeners.emplace(key, std::move(call));
    }
  }
  Listener listener;
  if (key < 0) {
    call();
    return listener;
  }
  std::weak_ptr<State> weak = state_;
  listener.registered_ = std::shared_ptr<void>(nullptr, [weak, key](void*) {
    auto state = weak.lock();
    if (!state) return;
    {
      std::lock_guard lock(state->mutex);
      if (state->listeners.erase(key)) return;
    }
    std::lock_guard wait(state->calling);
  });
  return listener;
}

}  // namespace agl_grpc
