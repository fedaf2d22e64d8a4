// Command calculator is the calculator agent of `make train` in Go: it asks the model, works out what
// the model asks of the calculator, and takes its final answer.
//
//	go run ./examples/calculator 127.0.0.1:4747 RUN [CONCURRENCY]
//
// beside a training run whose workers are elsewhere: AGL_CURRENT_ROLE=algorithm make train RUN=RUN
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"

	agl "github.com/agl-grpc/agl-grpc/clients/go"
)

const (
	maxTurns  = 3
	maxTokens = 20
)

var (
	call   = regexp.MustCompile(`(?s)^\s*<calc>(.*?)</calc>\s*$`)
	answer = regexp.MustCompile(`^\s*Answer: (-?\d{1,9})\s*$`)
	chain  = regexp.MustCompile(`^-?\d{1,9}([-+]\d{1,9}){0,15}$`)
	term   = regexp.MustCompile(`[-+]?\d+`)
)

type message struct {
	Role       string `json:"role"`
	Content    string `json:"content"`
	ToolCallID string `json:"tool_call_id,omitempty"`
}

func main() {
	if len(os.Args) < 3 {
		log.Fatal("usage: calculator HOST:PORT RUN [CONCURRENCY]")
	}
	concurrency := int64(16)
	if len(os.Args) > 3 {
		concurrency, _ = strconv.ParseInt(os.Args[3], 10, 64)
	}
	client, err := agl.Dial(os.Args[1], agl.WithRun(os.Args[2]))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	queues := []string{os.Args[2], os.Args[2] + "-validation"} // where a Trainer puts its rollouts
	worker := &agl.Worker{Client: client, Agent: agent, Options: agl.LeaseOptions{Queues: queues, Credits: concurrency}}
	if err := worker.Run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

// agent's reward is 1 for the right answer, else 0.
func agent(ctx context.Context, task *agl.Task) error {
	var question struct{ Question, Answer string }
	if err := task.Decode(&question); err != nil {
		return err
	}
	if task.Model == nil {
		return errors.New("no model is published in this run")
	}
	found, err := solve(ctx, question.Question, task.Model)
	if err != nil {
		return err
	}
	if found == question.Answer {
		return task.Reward("", 1)
	}
	return task.Reward("", 0)
}

func solve(ctx context.Context, question string, model *agl.Model) (string, error) {
	messages := []message{{Role: "user", Content: question}}
	for turn := 0; turn < maxTurns; turn++ {
		text, err := chat(ctx, model, messages)
		if err != nil {
			return "", err
		}
		asked := call.FindStringSubmatch(text)
		if asked == nil {
			final := answer.FindStringSubmatch(text)
			if final == nil {
				return "", nil
			}
			value, _ := strconv.Atoi(final[1])
			return strconv.Itoa(value), nil
		}
		reply := message{Role: "tool", Content: calculate(asked[1]), ToolCallID: fmt.Sprintf("calc-%d", turn)}
		messages = append(messages, message{Role: "assistant", Content: text}, reply)
	}
	return "", nil
}

func chat(ctx context.Context, model *agl.Model, messages []message) (string, error) {
	body := map[string]interface{}{"model": model.Model, "messages": messages, "max_tokens": maxTokens}
	for name, value := range model.SamplingParameters {
		body[name] = value
	}
	encoded, err := json.Marshal(body)
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, model.BaseURL+"/chat/completions", bytes.NewReader(encoded))
	if err != nil {
		return "", err
	}
	request.Header.Set("content-type", "application/json")
	request.Header.Set("authorization", "Bearer "+model.APIKey)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1000))
		return "", fmt.Errorf("the model answered %s: %s", response.Status, text)
	}
	var reply struct{ Choices []struct{ Message message } }
	if err := json.NewDecoder(response.Body).Decode(&reply); err != nil || len(reply.Choices) == 0 {
		return "", fmt.Errorf("the model's answer has no choice: %v", err)
	}
	return reply.Choices[0].Message.Content, nil
}

// calculate is the value of a chain of whole numbers with + and -, or "error".
func calculate(expression string) string {
	expression = strings.Join(strings.Fields(expression), "")
	if !chain.MatchString(expression) {
		return "error"
	}
	sum := 0
	for _, part := range term.FindAllString(expression, -1) {
		value, _ := strconv.Atoi(part)
		sum += value
	}
	return strconv.Itoa(sum)
}
