// Command replay replays the shared vectors: replay HOST:PORT FOLDER [AUTHORITY], the last a PEM file for TLS.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	agl "github.com/agl-grpc/agl-grpc/clients/go"
)

const timeout = 20 * time.Second

type step struct {
	RPC     string                   `json:"rpc"`
	Send    []map[string]interface{} `json:"send"`
	Receive []interface{}            `json:"receive"`
	Error   map[string]interface{}   `json:"error"`
	Keep    map[string]string        `json:"keep"`
	Until   string                   `json:"until"`
	Newer   map[string]string        `json:"newer"`
	Bytes   map[string]string        `json:"bytes"`
}

func main() {
	var options []agl.Option
	if len(os.Args) > 3 {
		authority, err := os.ReadFile(os.Args[3])
		roots := x509.NewCertPool()
		if err != nil || !roots.AppendCertsFromPEM(authority) {
			fmt.Println("no authority in", os.Args[3])
			os.Exit(2)
		}
		options = append(options, agl.WithTLS(&tls.Config{RootCAs: roots}))
	}
	client, err := agl.Dial(os.Args[1], options...)
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	defer client.Close()
	files, _ := filepath.Glob(filepath.Join(os.Args[2], "*.json"))
	sort.Strings(files)
	failed := 0
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		if err := replay(client, name, file); err != nil {
			failed++
			fmt.Printf("FAILED %s: %v\n", name, err)
		} else {
			fmt.Println("ok", name)
		}
	}
	if failed > 0 {
		os.Exit(1)
	}
}

func replay(client *agl.Client, name, file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var vector struct {
		Steps []json.RawMessage `json:"steps"`
	}
	if err := json.Unmarshal(text, &vector); err != nil {
		return err
	}
	kept := map[string]string{"run": name}
	for number, raw := range vector.Steps {
		var one step
		if err := json.Unmarshal(fill(raw, kept), &one); err != nil {
			return err
		}
		where := fmt.Sprintf("step %d (%s)", number, one.RPC)
		messages, err := call(client, one)
		received := plain(messages)
		if err := check(received, err, one, where); err != nil {
			return err
		}
		if err := checkBytes(messages, one, where); err != nil {
			return err
		}
		for key, place := range one.Keep {
			kept[key] = at(received, place)
		}
	}
	return nil
}

func check(received []interface{}, failure error, one step, where string) error {
	if one.Error == nil {
		if failure != nil {
			return fmt.Errorf("%s: %v", where, failure)
		}
		return match(received, toList(one.Receive), where)
	}
	var known *agl.Error
	if !errors.As(failure, &known) {
		return fmt.Errorf("%s: no error of the store came, but %v %v", where, received, failure)
	}
	info := map[string]interface{}{}
	for key, value := range known.Info {
		info[key] = value
	}
	found := map[string]interface{}{"code": float64(known.Code), "reason": known.Reason, "info": info}
	return match(found, one.Error, where+": error")
}

func toList(items []interface{}) interface{} {
	if items == nil {
		return []interface{}{}
	}
	return items
}

func checkBytes(messages []proto.Message, one step, where string) error {
	for place, expected := range one.Bytes {
		message, err := messageAt(messages, place)
		if err != nil {
			return err
		}
		found, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
		if err != nil {
			return err
		}
		if err := match(hex.EncodeToString(found), expected, where+": the bytes of "+place); err != nil {
			return err
		}
	}
	return nil
}

// messageAt finds the message at a place as "0.groups.0.spans.1": lists by index, fields by their names in JSON.
func messageAt(messages []proto.Message, place string) (proto.Message, error) {
	parts := strings.Split(place, ".")
	first, err := strconv.Atoi(parts[0])
	if err != nil || first >= len(messages) {
		return nil, fmt.Errorf("no message is at %s", place)
	}
	found := protoreflect.ValueOfMessage(messages[first].ProtoReflect())
	for _, part := range parts[1:] {
		if list, ok := found.Interface().(protoreflect.List); ok {
			index, err := strconv.Atoi(part)
			if err != nil || index >= list.Len() {
				return nil, fmt.Errorf("nothing is at %s", place)
			}
			found = list.Get(index)
			continue
		}
		field := found.Message().Descriptor().Fields().ByJSONName(part)
		if field == nil || field.Kind() != protoreflect.MessageKind {
			return nil, fmt.Errorf("no message is at %s", place)
		}
		found = found.Message().Mutable(field)
	}
	return found.Message().Interface(), nil
}

func merge(messages []proto.Message, newer map[string]string) error {
	for place, text := range newer {
		fields, err := hex.DecodeString(text)
		if err != nil {
			return err
		}
		message, err := messageAt(messages, place)
		if err != nil {
			return err
		}
		if err := (proto.UnmarshalOptions{Merge: true}).Unmarshal(fields, message); err != nil {
			return err
		}
	}
	return nil
}

func call(client *agl.Client, one step) ([]proto.Message, error) {
	service, name := "agl_grpc.v1."+strings.Split(one.RPC, "/")[0], strings.Split(one.RPC, "/")[1]
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return nil, err
	}
	method := found.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(name))
	path := "/" + service + "/" + name
	messages := make([]proto.Message, 0, len(one.Send))
	for _, fields := range one.Send {
		text, _ := json.Marshal(fields)
		message := newMessage(method.Input())
		if err := protojson.Unmarshal(text, message); err != nil {
			return nil, err
		}
		messages = append(messages, message)
	}
	if err := merge(messages, one.Newer); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if !method.IsStreamingClient() && !method.IsStreamingServer() {
		answer := newMessage(method.Output())
		if err := client.Conn().Invoke(ctx, path, messages[0], answer); err != nil {
			return nil, err
		}
		return []proto.Message{answer}, nil
	}
	desc := &grpc.StreamDesc{ClientStreams: method.IsStreamingClient(), ServerStreams: method.IsStreamingServer()}
	stream, err := client.Conn().NewStream(ctx, desc, path)
	if err != nil {
		return nil, err
	}
	return exchange(stream, method, messages, one)
}

func exchange(stream grpc.ClientStream, method protoreflect.MethodDescriptor, messages []proto.Message, one step) ([]proto.Message, error) {
	var received []proto.Message
	inStep := method.IsStreamingClient() && method.IsStreamingServer()
	for len(messages) > 0 {
		if err := stream.SendMsg(messages[0]); err != nil && err != io.EOF {
			return received, err
		}
		messages = messages[1:]
		if !inStep || len(messages) == 0 {
			continue
		}
		answer := newMessage(method.Output())
		if err := stream.RecvMsg(answer); err != nil {
			return received, err
		}
		received = append(received, answer)
	}
	if one.Until == "" {
		if err := stream.CloseSend(); err != nil {
			return received, err
		}
	}
	for one.Until == "" || len(received) < len(one.Receive) {
		answer := newMessage(method.Output())
		if err := stream.RecvMsg(answer); err == io.EOF {
			break
		} else if err != nil {
			return received, err
		}
		received = append(received, answer)
	}
	return received, nil
}

func newMessage(desc protoreflect.MessageDescriptor) proto.Message {
	kind, err := protoregistry.GlobalTypes.FindMessageByName(desc.FullName())
	if err != nil {
		panic(err) // every message of the contract is linked in
	}
	return kind.New().Interface()
}

func plain(messages []proto.Message) []interface{} {
	values := make([]interface{}, len(messages))
	for index, message := range messages {
		text, err := protojson.Marshal(message)
		if err != nil {
			panic(err) // what was parsed can be written
		}
		if err := json.Unmarshal(text, &values[index]); err != nil {
			panic(err)
		}
	}
	return values
}

var place = regexp.MustCompile(`\$\{(\w+)\}`)

func fill(raw []byte, kept map[string]string) []byte {
	return place.ReplaceAllFunc(raw, func(found []byte) []byte {
		text, _ := json.Marshal(kept[string(found[2:len(found)-1])])
		return text[1 : len(text)-1]
	})
}

func match(found, expected interface{}, where string) error {
	switch expected := expected.(type) {
	case nil:
		if found != nil {
			return fmt.Errorf("%s is %v and should not be set", where, found)
		}
	case map[string]interface{}:
		fields, _ := found.(map[string]interface{})
		for key, value := range expected {
			if err := match(fields[key], value, where+"."+key); err != nil {
				return err
			}
		}
	case []interface{}:
		list, _ := found.([]interface{})
		if len(list) != len(expected) {
			return fmt.Errorf("%s has %d elements, not %d: %v", where, len(list), len(expected), found)
		}
		for index, value := range expected {
			if err := match(list[index], value, where+"."+strconv.Itoa(index)); err != nil {
				return err
			}
		}
	default:
		if expected == "*" && found != nil {
			return nil
		}
		if found != expected {
			return fmt.Errorf("%s is %v, not %v", where, found, expected)
		}
	}
	return nil
}

func at(received interface{}, place string) string {
	for _, part := range strings.Split(place, ".") {
		switch value := received.(type) {
		case []interface{}:
			index, _ := strconv.Atoi(part)
			received = value[index]
		case map[string]interface{}:
			received = value[part]
		}
	}
	return fmt.Sprint(received)
}
