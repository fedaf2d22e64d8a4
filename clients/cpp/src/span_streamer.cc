#include "agl_grpc/span_streamer.hpp"

#include <algorithm>

namespace agl_grpc {
namespace {

constexpr int kTriesOfARefusedProducer = 5;
constexpr int kMaxSpans = 1000;
constexpr size_t kMaxPartBytes = 1 << 20;
constexpr size_t kMaxSpanBytes = 4 << 20;
constexpr size_t kMaxBufferBytes = 64 << 20;

}  // namespace

SpanStreamer::SpanStreamer(Client client, std::string producer_id)
    : client_(std::move(client)), producer_id_(producer_id.empty() ? "cpp-" + new_id() : std::move(producer_id)) {
  running_ = std::thread([this] { run(); });
}

SpanStreamer::~SpanStreamer() {
  try {
    close(std::chrono::milliseconds(0));
  } catch (const Error&) {
    // Each caller's future has the same word.
  }
}

SpanAck SpanStreamer::send(v1::AttemptSpans group) {
  std::vector<v1::AttemptSpans> groups;
  groups.push_back(std::move(group));
  return send(std::move(groups));
}

std::future<SpanAck> SpanStreamer::submit(std::vector<v1::AttemptSpans> groups) {
  const auto submission = std::make_shared<Submission>();
  auto answer = submission->done.get_future();
  std::vector<Part> parts;
  size_t size = 0;
  for (size_t place = 0; place < groups.size(); place++) {
    for (auto& part : split(std::move(groups[place]))) {
      part.place = static_cast<int>(place);
      part.submission = submission;
      if (part.size > kMaxSpanBytes) {
        submission->ack.rejected.push_back(too_large(part));
        continue;
      }
      size += part.size;
      parts.push_back(std::move(part));
    }
  }
  submission->parts = parts.size();
  if (parts.empty()) {
    submission->done.set_value(std::move(submission->ack));
    return answer;
  }
  std::unique_lock lock(mutex_);
  room_.wait(lock, [&] { return failure_ || buffered_ == 0 || buffered_ + size <= kMaxBufferBytes; });
  if (failure_) {
    submission->done.set_exception(failure_);
    return answer;
  }
  buffered_ += size;
  for (auto& part : parts) inbox_.push_back(std::move(part));
  work_.notify_all();
  return answer;
}

void SpanStreamer::close(std::chrono::milliseconds limit) {
  std::optional<Error> given_up;
  std::exception_ptr failed;
  {
    std::unique_lock lock(mutex_);
    if (closed_) return;
    closed_ = true;
    const auto settled = [this] { return failure_ || (inbox_.empty() && in_flight_.empty()); };
    if (!room_.wait_for(lock, limit, settled)) {
      given_up.emplace(grpc::StatusCode::DEADLINE_EXCEEDED, "",
                       std::to_string(buffered_) + " bytes of spans were not stored in time and are given up");
    }
    failed = failure_;
  }
  fail(given_up ? *given_up : Error(grpc::StatusCode::CANCELLED, "", "the SpanStreamer is closed"));
  stop_.request();
  running_.join();
  if (failed) std::rethrow_exception(failed);
  if (given_up) throw *given_up;
}

void SpanStreamer::fail(const Error& error) {
  std::lock_guard lock(mutex_);
  if (!failure_) failure_ = std::make_exception_ptr(error);
  const auto tell = [this](Part& part) {
    if (!std::exchange(part.submission->told, true)) part.submission->done.set_exception(failure_);
  };
  for (auto& sent : in_flight_) std::for_each(sent->parts.begin(), sent->parts.end(), tell);
  std::for_each(inbox_.begin(), inbox_.end(), tell);
  inbox_.clear();
  in_flight_.clear();
  buffered_ = in_flight_bytes_ = 0;
  work_.notify_all();
  room_.notify_all();
}

void SpanStreamer::run() {
  int refusals = 0;
  for (int tries = 0; !stop_.requested(); tries++) {
    int64_t before;
    {
      std::lock_guard lock(mutex_);
      before = acknowledged_;
    }
    bool opened = false;
    const grpc::Status status = follow(&opened);
    if (stop_.requested()) return;
    if (opened) tries = 0;
    const Error error = error_from(status, client_.target());
    {
      std::lock_guard lock(mutex_);
      refusals = status.ok() || error.transient() || acknowledged_ > before ? 0 : refusals + 1;
    }
    if (error.is(v1::ERROR_REASON_STREAM_FENCED) || refusals >= kTriesOfARefusedProducer) {
      fail(error);
      return;
    }
    client_.again(error, tries, stop_, std::nullopt);
  }
}

grpc::Status SpanStreamer::follow(bool* opened) {
  grpc::ClientContext context;
  client_.authorise(&context);
  const auto listener = stop_.listen([&context] { context.TryCancel(); });
  const int session = begin();
  const auto stream = client_.stub(static_cast<Store*>(nullptr)).StreamSpans(&context);
  v1::StreamSpansRequest opening;
  opening.mutable_open()->set_producer_id(producer_id_);
  opening.mutable_open()->set_resume(true);
  stream->Write(opening);  // when that fails, the end has the status
  std::thread writer;
  for (v1::StreamSpansResponse response; stream->Read(&response); response.Clear()) {
    if (response.has_opened() && !*opened) {
      *opened = true;
      writer =
          std::thread([this, session, raw = stream.get(), limits = response.opened()] { write(raw, limits, session); });
    } else if (response.has_ack()) {
      settle(response.ack());
    } else if (response.has_drain()) {
      std::lock_guard lock(mutex_);
      draining_ = true;
      work_.notify_all();
    }
  }
  begin();  // the writer of this stream stops
  if (writer.joinable()) writer.join();
  return stream->Finish();
}

int SpanStreamer::begin() {
  std::lock_guard lock(mutex_);
  session_++;
  draining_ = false;
  for (auto& sent : in_flight_) sent->on_this_stream = false;
  work_.notify_all();
  return session_;
}

void SpanStreamer::write(Stream* stream, v1::SpanStreamOpened limits, int session) {
  std::unique_lock lock(mutex_);
  // Numbers begin anew: a message is answered for again, so that no rejection is lost with its ack.
  sequence_ = std::max(sequence_, limits.last_sequence());
  const auto current = [&] { return session_ == session && !draining_ && !failure_; };
  for (const auto& sent : std::deque<std::shared_ptr<Sent>>(in_flight_)) {
    if (!current()) break;
    sent->rejected.clear();
    if (!put(stream, sent, lock)) return;
  }
  while (current()) {
    if (inbox_.empty() || !fits(limits)) {
      work_.wait(lock);
      continue;
    }
    const auto sent = next_message();
    in_flight_.push_back(sent);
    in_flight_bytes_ += sent->size;
    if (!put(stream, sent, lock)) return;
  }
  if (session_ != session) return;
  lock.unlock();
  stream->WritesDone();  // the reader of the same call learns its status
}

bool SpanStreamer::put(Stream* stream, const std::shared_ptr<Sent>& sent, std::unique_lock<std::mutex>& lock) {
  sent->message.mutable_spans()->set_sequence(++sequence_);
  sent->on_this_stream = true;
  // Without the lock, so that acknowledgements are read meanwhile. The message is the writer's alone.
  lock.unlock();
  const bool written = stream->Write(sent->message);
  lock.lock();
  return written;
}

bool SpanStreamer::fits(const v1::SpanStreamOpened& limits) const {
  if (in_flight_.empty()) return true;
  const int64_t bytes = static_cast<int64_t>(in_flight_bytes_ + inbox_.front().size);
  if (limits.max_in_flight_bytes() > 0 && bytes > limits.max_in_flight_bytes()) return false;
  return limits.max_in_flight_messages() == 0 ||
         static_cast<int64_t>(in_flight_.size()) < limits.max_in_flight_messages();
}

std::shared_ptr<SpanStreamer::Sent> SpanStreamer::next_message() {
  auto sent = std::make_shared<Sent>();
  int spans = 0;
  while (!inbox_.empty()) {
    Part& part = inbox_.front();
    spans += part.group.spans_size();
    if (!sent->parts.empty() && (sent->size + part.size > kMaxPartBytes || spans > kMaxSpans)) break;
    sent->size += part.size;
    *sent->message.mutable_spans()->add_groups() = std::move(part.group);
    sent->parts.push_back(std::move(part));
    inbox_.pop_front();
  }
  return sent;
}

void SpanStreamer::settle(const v1::SpanStreamAck& ack) {
  std::lock_guard lock(mutex_);
  for (const auto& rejected : ack.rejected()) {
    for (auto& sent : in_flight_) {
      if (sent->on_this_stream && sent->message.spans().sequence() == rejected.sequence()) {
        sent->rejected.push_back(rejected.span());
      }
    }
  }
  while (!in_flight_.empty() && in_flight_.front()->on_this_stream &&
         in_flight_.front()->message.spans().sequence() <= ack.sequence()) {
    const auto sent = in_flight_.front();
    in_flight_.pop_front();
    in_flight_bytes_ -= sent->size;
    acknowledged_++;
    settle_message(*sent, ack.durability());
  }
  work_.notify_all();
  room_.notify_all();
}

void SpanStreamer::settle_message(Sent& sent, v1::Durability durability) {
  for (auto& span : sent.rejected) {
    Part& part = sent.parts[static_cast<size_t>(span.group_index())];
    const int index = span.index() >= 0 ? span.index() + part.first : span.index();
    part.submission->ack.rejected.push_back({part.place, index, span.span_id(), error_from(span.status())});
  }
  for (auto& part : sent.parts) {
    buffered_ -= part.size;
    settle(part, durability);
  }
}

void SpanStreamer::settle(Part& part, v1::Durability durability) {
  Submission& one = *part.submission;
  // The weakest promise among the parts is the one that holds.
  if (one.ack.durability == v1::DURABILITY_UNSPECIFIED || durability < one.ack.durability) {
    one.ack.durability = durability;
  }
  if (--one.parts == 0 && !std::exchange(one.told, true)) one.done.set_value(std::move(one.ack));
}

// Cuts a group into parts that fit into one message each; announcements go with the first.
std::vector<SpanStreamer::Part> SpanStreamer::split(v1::AttemptSpans group) {
  std::vector<Part> parts;
  const size_t whole = group.ByteSizeLong();
  if (whole <= kMaxPartBytes && group.spans_size() <= kMaxSpans) {
    parts.push_back({std::move(group), whole, 0, 0, nullptr});
    return parts;
  }
  size_t bytes = 0;
  for (int index = 0; index < group.spans_size(); index++) {
    const size_t size = group.spans(index).ByteSizeLong();
    if (parts.empty() || bytes + size > kMaxPartBytes || parts.back().group.spans_size() >= kMaxSpans) {
      Part part;
      part.first = index;
      part.group.set_rollout_id(group.rollout_id());
      part.group.set_attempt_id(group.attempt_id());
      if (parts.empty()) {
        part.group.mutable_open_calls()->Swap(group.mutable_open_calls());
        part.group.mutable_abandoned_calls()->Swap(group.mutable_abandoned_calls());
      }
      parts.push_back(std::move(part));
      bytes = 0;
    }
    bytes += size;
    *parts.back().group.add_spans() = std::move(*group.mutable_spans(index));
  }
  for (auto& part : parts) part.size = part.group.ByteSizeLong();
  return parts;
}

SpanRejection SpanStreamer::too_large(const Part& part) {
  Error error(grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD",
              "spans[" + std::to_string(part.first) + "] has " + std::to_string(part.size) + " bytes; at most " +
                  std::to_string(kMaxSpanBytes) + " are allowed: leave long values out");
  const std::string id = part.group.spans_size() ? part.group.spans(0).span_id() : std::string();
  return {part.place, part.first, id, error};
}

}  // namespace agl_grpc
