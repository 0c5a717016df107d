package ipc_test

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"

	"github.com/remuda-dev/remuda/ipc"
)

// The parent of a Node worker, in Go: it accepts connections and has the worker
// answer them.
func ExampleNewNode() {
	parent, child, err := ipc.Pair()
	if err != nil {
		log.Fatal(err)
	}
	worker, err := ipc.NewNode(parent, ipc.Options{
		OnMessage: func(msg json.RawMessage, _ *os.File) { fmt.Println("the worker says", string(msg)) },
	})
	if err != nil {
		log.Fatal(err)
	}
	cmd := exec.Command("node", "-e", `
		process.on('message', (msg, socket) => {
			if (msg === 'socket' && socket) socket.end('Handled by worker\n')
		})
		process.on('disconnect', () => {})
		process.send('ready')`)
	cmd.Env = append(ipc.Environ(os.Environ()), ipc.NodeEnv(3)...)
	cmd.ExtraFiles = []*os.File{child} // descriptor 3
	if err := cmd.Start(); err != nil {
		log.Fatal(err)
	}
	child.Close()
	served := make(chan error)
	go func() { served <- worker.Serve(nil) }()

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	conn, err := listener.Accept()
	if err != nil {
		log.Fatal(err)
	}
	f, err := conn.(*net.TCPConn).File()
	if err != nil {
		log.Fatal(err)
	}
	if err := worker.Send(json.RawMessage(`"socket"`), f); err != nil {
		log.Fatal(err)
	}
	f.Close() // the worker has its own
	conn.Close()

	answer, _ := io.ReadAll(client)
	client.Close()
	listener.Close()
	worker.Stop() // the worker sees 'disconnect' and ends
	fmt.Printf("the client got %q, %v, %v\n", answer, <-served, cmd.Wait())
	// Output:
	// the worker says "ready"
	// the client got "Handled by worker\n", <nil>, <nil>
}
