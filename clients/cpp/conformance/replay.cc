// Replays the shared vectors: replay HOST:PORT FOLDER.
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/impl/codegen/proto_utils.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>

#include "agl_grpc/agl_grpc.hpp"

namespace {

using google::protobuf::Message;
using google::protobuf::MethodDescriptor;
using google::protobuf::Value;
using google::protobuf::util::JsonStringToMessage;
using google::protobuf::util::MessageToJsonString;

constexpr std::chrono::seconds kTimeout{20};

struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Value parsed(const std::string& text) {
  Value value;
  const auto status = JsonStringToMessage(text, &value);
  if (!status.ok()) throw Mismatch("not JSON: " + status.ToString());
  return value;
}

std::string text_of(const Message& message) {
  std::string text;
  const auto status = MessageToJsonString(message, &text);
  if (!status.ok()) throw Mismatch("not to be written as JSON: " + status.ToString());
  return text;
}

const Value* member(const Value& value, const std::string& name) {
  const auto& fields = value.struct_value().fields();
  const auto found = fields.find(name);
  return found == fields.end() ? nullptr : &found->second;
}

std::string string_at(const Value& value, const std::string& name) {
  const Value* found = member(value, name);
  return found == nullptr ? std::string() : found->string_value();
}

// Places ${name} inside texts are filled with what earlier steps kept.
std::string filled(const std::string& text, const std::map<std::string, std::string>& kept) {
  std::string made;
  for (size_t at = 0;;) {
    const size_t open = text.find("${", at);
    made += text.substr(at, open - at);
    if (open == std::string::npos) return made;
    const size_t close = text.find('}', open);
    made += kept.at(text.substr(open + 2, close - open - 2));
    at = close + 1;
  }
}

void fill(Value* value, const std::map<std::string, std::string>& kept) {
  if (value->kind_case() == Value::kStringValue) value->set_string_value(filled(value->string_value(), kept));
  if (value->kind_case() == Value::kStructValue) {
    for (auto& [key, item] : *value->mutable_struct_value()->mutable_fields()) fill(&item, kept);
  }
  if (value->kind_case() == Value::kListValue) {
    for (auto& item : *value->mutable_list_value()->mutable_values()) fill(&item, kept);
  }
}

void match(const Value* found, const Value& expected, const std::string& where) {
  const std::string shown = found == nullptr ? "not set" : text_of(*found);
  if (expected.kind_case() == Value::kNullValue) {
    if (found != nullptr && found->kind_case() != Value::kNullValue) {
      throw Mismatch(where + " is " + shown + " and should not be set");
    }
  } else if (expected.kind_case() == Value::kStringValue && expected.string_value() == "*") {
    if (found == nullptr) throw Mismatch(where + " is not set");
  } else if (expected.kind_case() == Value::kStructValue) {
    for (const auto& [key, value] : expected.struct_value().fields()) {
      match(found == nullptr ? nullptr : member(*found, key), value, where + "." + key);
    }
  } else if (expected.kind_case() == Value::kListValue) {
    const int size = found == nullptr ? 0 : found->list_value().values_size();
    if (size != expected.list_value().values_size()) {
      throw Mismatch(where + " has " + std::to_string(size) + " elements, not " +
                     std::to_string(expected.list_value().values_size()) + ": " + shown);
    }
    for (int index = 0; index < size; index++) {
      match(&found->list_value().values(index), expected.list_value().values(index),
            where + "." + std::to_string(index));
    }
  } else if (found == nullptr || text_of(*found) != text_of(expected)) {
    throw Mismatch(where + " is " + shown + ", not " + text_of(expected));
  }
}

std::string at(const Value& received, const std::string& place) {
  const Value* found = &received;
  std::istringstream parts(place);
  for (std::string part; std::getline(parts, part, '.');) {
    if (found->kind_case() == Value::kListValue) {
      const int index = std::stoi(part);
      if (index >= found->list_value().values_size()) throw Mismatch("nothing is at " + place);
      found = &found->list_value().values(index);
    } else {
      found = member(*found, part);
    }
    if (found == nullptr) throw Mismatch("nothing is at " + place);
  }
  return found->kind_case() == Value::kStringValue ? found->string_value() : text_of(*found);
}

using Messages = std::vector<std::unique_ptr<Message>>;

// The message at a place as 0.groups.0.spans.1: lists by index, fields by their names in JSON.
Message* message_at(const Messages& messages, const std::string& place) {
  std::istringstream parts(place);
  std::string part;
  std::getline(parts, part, '.');
  Message* found = messages.at(std::stoul(part)).get();
  const google::protobuf::FieldDescriptor* list = nullptr;
  while (std::getline(parts, part, '.')) {
    const auto* reflection = found->GetReflection();
    if (list != nullptr) {
      const int index = std::stoi(part);
      if (index >= reflection->FieldSize(*found, list)) throw Mismatch("nothing is at " + place);
      found = reflection->MutableRepeatedMessage(found, list, index);
      list = nullptr;
      continue;
    }
    const auto* field = found->GetDescriptor()->FindFieldByCamelcaseName(part);
    if (field == nullptr || field->cpp_type() != field->CPPTYPE_MESSAGE) throw Mismatch("no message is at " + place);
    if (field->is_repeated()) {
      list = field;
    } else {
      found = reflection->MutableMessage(found, field);
    }
  }
  return found;
}

std::string from_hex(const std::string& text) {
  std::string bytes;
  for (size_t at = 0; at + 1 < text.size(); at += 2) {
    bytes += static_cast<char>(std::stoi(text.substr(at, 2), nullptr, 16));
  }
  return bytes;
}

std::unique_ptr<Message> make(const google::protobuf::Descriptor* type) {
  return std::unique_ptr<Message>(google::protobuf::MessageFactory::generated_factory()->GetPrototype(type)->New());
}

grpc::ByteBuffer packed(const Message& message) {
  grpc::ByteBuffer buffer;
  bool own = false;
  const auto status = grpc::SerializationTraits<Message>::Serialize(message, &buffer, &own);
  if (!status.ok()) throw Mismatch(status.error_message());
  return buffer;
}

// A call by the name of its rpc, one operation after the other.
class Call {
 public:
  Call(const agl_grpc::Client& client, const MethodDescriptor* method) : method_(method), stub_(client.channel()) {
    client.authorise(&context_);
    agl_grpc::limit(&context_, kTimeout);
    const std::string path = "/" + method->service()->full_name() + "/" + method->name();
    call_ = stub_.PrepareCall(&context_, path, &queue_);
    call_->StartCall(this);
    wait();
  }
  ~Call() {
    context_.TryCancel();
    queue_.Shutdown();
    void* tag = nullptr;
    for (bool good = false; queue_.Next(&tag, &good);) {
    }
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  bool send(const Message& message) {
    call_->Write(packed(message), this);
    return wait();
  }
  void done() {
    call_->WritesDone(this);
    wait();
  }
  bool receive(Messages* received) {
    grpc::ByteBuffer buffer;
    call_->Read(&buffer, this);
    if (!wait()) return false;
    auto message = make(method_->output_type());
    const auto status = grpc::SerializationTraits<Message>::Deserialize(&buffer, message.get());
    if (!status.ok()) throw Mismatch(status.error_message());
    received->push_back(std::move(message));
    return true;
  }
  grpc::Status finish() {
    grpc::Status status;
    call_->Finish(&status, this);
    wait();
    return status;
  }

 private:
  bool wait() {
    void* tag = nullptr;
    bool good = false;
    return queue_.Next(&tag, &good) && good;
  }

  const MethodDescriptor* method_;
  grpc::GenericStub stub_;
  grpc::CompletionQueue queue_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
};

Messages to_send(const MethodDescriptor* method, const Value& step) {
  Messages made;
  for (const auto& fields : member(step, "send")->list_value().values()) {
    made.push_back(make(method->input_type()));
    const auto status = JsonStringToMessage(text_of(fields), made.back().get());
    if (!status.ok()) throw Mismatch("a message to send: " + status.ToString());
  }
  if (const Value* newer = member(step, "newer")) {
    for (const auto& [place, fields] : newer->struct_value().fields()) {
      message_at(made, place)->MergeFromString(from_hex(fields.string_value()));
    }
  }
  return made;
}

grpc::Status exchange(const agl_grpc::Client& client, const Value& step, Messages* received) {
  const std::string rpc = string_at(step, "rpc");
  const size_t slash = rpc.find('/');
  const auto* service =
      google::protobuf::DescriptorPool::generated_pool()->FindServiceByName("agl_grpc.v1." + rpc.substr(0, slash));
  const auto* method = service == nullptr ? nullptr : service->FindMethodByName(rpc.substr(slash + 1));
  if (method == nullptr) throw Mismatch("no such rpc");
  const Messages messages = to_send(method, step);
  const bool in_step = method->client_streaming() && method->server_streaming();
  const bool until = member(step, "until") != nullptr;
  const Value* expected = member(step, "receive");
  Call call(client, method);
  bool open = true;
  for (size_t number = 0; open && number < messages.size(); number++) {
    open = call.send(*messages[number]) && !(in_step && number + 1 < messages.size() && !call.receive(received));
  }
  if (!until || !method->client_streaming()) call.done();
  const size_t enough = expected == nullptr ? 0 : static_cast<size_t>(expected->list_value().values_size());
  while (open && (!until || received->size() < enough)) open = call.receive(received);
  return until && open ? grpc::Status::OK : call.finish();
}

Value outcome(const agl_grpc::Error& error) {
  Value found;
  auto& fields = *found.mutable_struct_value()->mutable_fields();
  fields["code"].set_number_value(error.code);
  fields["reason"].set_string_value(error.reason);
  auto& info = *fields["info"].mutable_struct_value()->mutable_fields();
  for (const auto& [key, value] : error.info) info[key].set_string_value(value);
  return found;
}

void match_bytes(const Messages& messages, const Value& step, const std::string& where) {
  const Value* bytes = member(step, "bytes");
  if (bytes == nullptr) return;
  for (const auto& [place, expected] : bytes->struct_value().fields()) {
    const std::string found = message_at(messages, place)->SerializeAsString();
    if (found != from_hex(expected.string_value())) {
      throw Mismatch(where + ": the bytes of " + place + " are other ones than " + expected.string_value());
    }
  }
}

void replay(const agl_grpc::Client& client, const std::filesystem::path& file) {
  std::ifstream stream(file);
  std::stringstream text;
  text << stream.rdbuf();
  Value vector = parsed(text.str());
  std::map<std::string, std::string> kept{{"run", file.stem().string()}};
  int number = 0;
  for (auto& step :
       *(*vector.mutable_struct_value()->mutable_fields())["steps"].mutable_list_value()->mutable_values()) {
    fill(&step, kept);
    const std::string where = "step " + std::to_string(number++) + " (" + string_at(step, "rpc") + ")";
    Messages messages;
    const grpc::Status status = exchange(client, step, &messages);
    Value received;
    received.mutable_list_value();
    for (const auto& message : messages) *received.mutable_list_value()->add_values() = parsed(text_of(*message));
    if (const Value* expected = member(step, "error")) {
      if (status.ok()) throw Mismatch(where + ": no error came, but " + text_of(received));
      const Value found = outcome(agl_grpc::error_from(status, client.target()));
      match(&found, *expected, where + ": error");
    } else if (!status.ok()) {
      throw Mismatch(where + ": " + agl_grpc::error_from(status, client.target()).what());
    } else {
      Value nothing;
      nothing.mutable_list_value();
      const Value* receive = member(step, "receive");
      match(&received, receive == nullptr ? nothing : *receive, where);
      match_bytes(messages, step, where);
    }
    const Value* keep = member(step, "keep");
    if (keep == nullptr) continue;
    for (const auto& [name, place] : keep->struct_value().fields()) kept[name] = at(received, place.string_value());
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::cerr << "usage: replay HOST:PORT FOLDER [AUTHORITY], the last a PEM file for TLS\n";
    return 2;
  }
  agl_grpc::ClientOptions options;
  if (count == 4) {
    std::ifstream stream(arguments[3]);
    std::stringstream text;
    text << stream.rdbuf();
    options.security = grpc::SslCredentials({text.str(), "", ""});
  }
  const agl_grpc::Client client(arguments[1], options);
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(arguments[2])) {
    if (entry.path().extension() == ".json") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  int failed = 0;
  for (const auto& file : files) {
    try {
      replay(client, file);
      std::cout << "ok " << file.stem().string() << std::endl;
    } catch (const std::exception& error) {
      failed++;
      std::cout << "FAILED " << file.stem().string() << ": " << error.what() << std::endl;
    }
  }
  return failed > 0 ? 1 : 0;
}
