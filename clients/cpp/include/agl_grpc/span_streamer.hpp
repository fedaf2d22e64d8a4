// Spans sent over one stream, with word of when they are on disk.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "agl_grpc/client.hpp"

namespace agl_grpc {

/// A span that the store did not keep.
struct SpanRejection {
  /// The index of the span's AttemptSpans as they were given to send().
  int group = 0;
  /// The span's place in its group; -1 = the whole group, -2 = an announcement.
  int index = 0;
  std::string span_id;
  Error error;
};

/// Everything that is not in ``rejected`` is stored, as durably as ``durability`` tells.
struct SpanAck {
  v1::Durability durability = v1::DURABILITY_UNSPECIFIED;
  std::vector<SpanRejection> rejected;
};

/// Sends spans to the store over one stream and says when they are on disk.
///
/// What is not acknowledged when the stream breaks is sent again on the next one; the store knows spans
/// by their own ids, so each is kept exactly once. Sending goes on while the store is away; at most
/// 64 MiB are held meanwhile, then callers wait. It may be used from any thread.
class SpanStreamer {
 public:
  SpanStreamer(Client client, std::string producer_id);
  /// Gives up what is not stored if close() was not called.
  ~SpanStreamer();
  SpanStreamer(const SpanStreamer&) = delete;
  SpanStreamer& operator=(const SpanStreamer&) = delete;

  const std::string& producer_id() const { return producer_id_; }

  /// Takes spans, once there is room in the buffer; the future is theirs to be on disk. It fails with Error:
  /// STREAM_FENCED when another streamer took the producer id over.
  std::future<SpanAck> submit(std::vector<v1::AttemptSpans> groups);

  /// Sends spans and waits until they are on disk.
  SpanAck send(std::vector<v1::AttemptSpans> groups) { return submit(std::move(groups)).get(); }
  SpanAck send(v1::AttemptSpans group);

  /// Waits until everything is settled and stops; when the limit is over first, what is left is given up and
  /// Error is thrown.
  void close(std::chrono::milliseconds limit = std::chrono::seconds(30));

 private:
  struct Submission {
    SpanAck ack;
    size_t parts = 0;
    bool told = false;
    std::promise<SpanAck> done;
  };
  struct Part {
    v1::AttemptSpans group;
    size_t size = 0;
    int place = 0;  // of the caller's group
    int first = 0;  // place of the part's first span in it
    std::shared_ptr<Submission> submission;
  };
  struct Sent {
    v1::StreamSpansRequest message;  // holds the parts' groups
    std::vector<Part> parts;
    size_t size = 0;
    bool on_this_stream = false;
    std::vector<v1::RejectedSpan> rejected;
  };
  using Stream = grpc::ClientReaderWriterInterface<v1::StreamSpansRequest, v1::StreamSpansResponse>;

  static std::vector<Part> split(v1::AttemptSpans group);
  static SpanRejection too_large(const Part& part);
  static void settle(Part& part, v1::Durability durability);
  void run();
  grpc::Status follow(bool* opened);
  void write(Stream* stream, v1::SpanStreamOpened limits, int session);
  bool put(Stream* stream, const std::shared_ptr<Sent>& sent, std::unique_lock<std::mutex>& lock);
  bool fits(const v1::SpanStreamOpened& limits) const;
  std::shared_ptr<Sent> next_message();
  void settle(const v1::SpanStreamAck& ack);
  void settle_message(Sent& sent, v1::Durability durability);
  int begin();
  void fail(const Error& error);

  Client client_;
  std::string producer_id_;
  Stop stop_;

  std::mutex mutex_;
  std::condition_variable work_;  // for the writer: something to send, room to send it, or an end
  std::condition_variable room_;  // for callers: room in the buffer, or everything is settled
  std::deque<Part> inbox_;
  std::deque<std::shared_ptr<Sent>> in_flight_;
  size_t buffered_ = 0;
  size_t in_flight_bytes_ = 0;
  int64_t sequence_ = 0;
  int64_t acknowledged_ = 0;
  std::exception_ptr failure_;
  int session_ = 0;  // number of the stream; a writer of an older one stops
  bool draining_ = false;
  bool closed_ = false;
  std::thread running_;
};

}  // namespace agl_grpc
