// A wish to stop that many can hear: threads wait on it, calls are cancelled by it.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

namespace agl_grpc {

/// A wish to stop. Copies share it; it may be used from any thread, and never ends by itself.
class Stop {
 public:
  Stop();

  /// One that is also requested when ``parent`` is.
  static Stop child_of(const Stop& parent);

  /// Asks whoever listens to stop; more than once is the same as once.
  void request() const;

  bool requested() const;

  /// Waits so long, or until it is requested; true when it was requested.
  bool wait_for(std::chrono::nanoseconds limit) const;

  /// Keeps a function to call when it is requested; while this lives the function may be running.
  class Listener {
   public:
    Listener() = default;
    Listener(Listener&&) = default;
    Listener& operator=(Listener&&) = default;

   private:
    friend class Stop;
    std::shared_ptr<void> registered_;
  };

  /// Calls the function once when it is requested (at once if it was), unless the listener is gone
  /// before; the listener's end waits for a call under way. The function must not wait for long, nor
  /// drop its own listener.
  [[nodiscard]] Listener listen(std::function<void()> call) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
  std::shared_ptr<Listener> parent_;
};

}  // namespace agl_grpc
