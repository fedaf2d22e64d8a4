// Leased work for one worker, kept over disconnects.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "agl_grpc/client.hpp"

namespace agl_grpc {

/// Which work a worker takes.
struct LeaseOptions {
  std::string worker_id;
  /// New at each start of a worker (the default): leases of the session that it does not name are released.
  std::string session_id;
  std::vector<std::string> queues;
  std::map<std::string, std::string> labels;
  /// 1 s to 1 h.
  std::chrono::milliseconds lease{30'000};
  /// Deliveries allowed at the start; more with grant().
  int64_t credits = 0;
};

/// The stream is open.
struct Connected {};
/// The stream broke; it is opened again.
struct Disconnected {
  std::string why;
};
/// Work.
struct Delivered {
  v1::LeasedRollout work;
};
/// A held lease is over: stop.
struct Lost {
  std::string attempt_id;
  std::string why;
};
/// An order of the store, repeated until it is acknowledged.
struct Commanded {
  v1::WorkerCommand command;
};
/// Why nothing comes.
struct Idle {
  std::string reason;
};
using LeaseEvent = std::variant<Connected, Disconnected, Delivered, Lost, Commanded, Idle>;

/// Takes work for one worker, and keeps it.
///
/// Work comes as long as credits last. A held lease is renewed at a third of its duration, all of a
/// worker's in one call, until complete() or release(). A stream that breaks is opened again with the
/// leases that are held and the credits that are left. Whether a lease is lost is the store's word
/// alone: while the store is away nothing ends. It may be used from any thread.
class LeaseStream {
 public:
  LeaseStream(Client client, LeaseOptions options);
  /// Closes it if close() was not called; an error of that is not reported.
  ~LeaseStream();
  LeaseStream(const LeaseStream&) = delete;
  LeaseStream& operator=(const LeaseStream&) = delete;

  const std::string& worker_id() const { return options_.worker_id; }

  /// Waits for the next event; none when the limit or ``stop`` comes first, or after close(). Throws Error when
  /// the store refuses the stream for good.
  std::optional<LeaseEvent> next(std::chrono::nanoseconds limit, const Stop& stop = Stop());

  /// The leases that are held now, by attempt id.
  std::map<std::string, v1::Lease> held() const;

  /// Allows so many more deliveries.
  void grant(int64_t credits = 1);

  /// Says that a command was carried out; the store stops repeating it.
  void acknowledge(const v1::WorkerCommand& command);

  /// Takes nothing new: credits that are left are void. What is held goes on.
  void drain(const std::string& reason);

  /// Ends a held attempt; completions made while a call is under way travel together in the next. Of the
  /// completion the lease's ids and token are filled in. Throws Error with LEASE_LOST when the lease is over:
  /// the result was not taken. Results wait for a store that is away.
  v1::Rollout complete(const v1::Lease& lease, v1::Completion completion);

  /// Hands attempts back unfinished; answers for each why it was refused, none = done.
  std::vector<std::optional<Error>> release(const std::string& reason, const std::vector<v1::Lease>& leases,
                                            const CallOptions& options = {});

  /// Ends the stream, handing back what is still held. Throws Error when that fails within the limit.
  void close(std::chrono::milliseconds limit = std::chrono::seconds(10));

 private:
  struct Pending {
    v1::Completion completion;
    std::promise<v1::Rollout> done;
  };
  struct Outgoing {
    std::deque<v1::StreamLeasesRequest> messages;
    bool closed = false;
  };

  void run();
  grpc::Status session();
  void write(grpc::ClientReaderWriterInterface<v1::StreamLeasesRequest, v1::StreamLeasesResponse>* stream,
             const std::shared_ptr<Outgoing>& outgoing);
  std::shared_ptr<Outgoing> open();
  void send(v1::StreamLeasesRequest message);
  void receive(v1::StreamLeasesResponse& response);
  void deliver(v1::LeasedRollout& work);
  void lose(const std::string& attempt_id, const std::string& why);
  void command(const google::protobuf::RepeatedPtrField<v1::WorkerCommand>& commands);
  void renew();
  void renew_once(const v1::RenewLeasesRequest& request, std::chrono::nanoseconds shortest);
  v1::RenewLeasesRequest renewable(std::chrono::nanoseconds* shortest) const;
  void complete_pending();
  void complete_batch(std::vector<Pending>& batch);
  template <typename Call>
  void end(const std::vector<std::string>& ids, Call call);
  void push(LeaseEvent event);
  bool disconnected(const std::string& why);
  void fail(const Error& error);

  Client client_;
  LeaseOptions options_;
  Stop stop_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // of events, outgoing and pending
  std::deque<LeaseEvent> events_;
  std::map<std::string, v1::Lease> held_;
  std::set<std::string> ending_;
  std::map<int64_t, bool> seen_;  // commands, and whether they were acknowledged
  std::shared_ptr<Outgoing> outgoing_;
  int64_t credits_;
  int64_t granted_ = 0;
  std::optional<std::string> drained_;
  bool connected_ = false;
  bool ended_ = false;
  bool no_more_results_ = false;
  bool closed_ = false;
  std::exception_ptr failure_;
  std::deque<Pending> pending_;
  std::thread running_, renewing_, completing_;
};

}  // namespace agl_grpc
