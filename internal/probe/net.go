package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"crypto/tls"
)

const (
	maxHeader    = 64 << 10
	maxRedirects = 5
	// maxBody is how much of an unready answer's body is shown, and of a
	// ready one's read so that the server sees a clean end.
	maxBody = 256
	maxRead = 4 << 10
)

func tryTCP(ctx context.Context, address string) error {
	begun := time.Now()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("tcp %s: %s", address, reason(err, begun))
	}
	conn.Close()
	return nil
}

// newHTTP makes an attempt to GET the address: 2xx and 3xx are ready. A
// redirect within the host is followed, one that leaves it is an answer like
// any other 3xx. No proxy. The certificate of an https address is not checked:
// the question is whether the program answers, nothing secret is sent, and the
// certificate of a program on localhost seldom fits.
func newHTTP(address string) (func(context.Context) error, func(), error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, nil, fmt.Errorf("http: %q is no http:// or https:// address: %w", address, ErrUnusable)
	}
	tr := &http.Transport{
		Proxy:                  nil,
		DialContext:            (&net.Dialer{}).DialContext,
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: true},
	}
	client := &http.Client{
		Transport: tr,
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if req.URL.Host != u.Host || len(via) > maxRedirects {
				return http.ErrUseLastResponse
			}
			return nil
		},
	}
	shown := u.Redacted()
	try := func(ctx context.Context) error {
		begun := time.Now()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
		if err != nil {
			return fmt.Errorf("http %s: %w", shown, err)
		}
		req.Header.Set("User-Agent", "remuda-probe")
		resp, err := client.Do(req)
		if err != nil {
			var ue *url.Error
			if errors.As(err, &ue) {
				err = ue.Err
			}
			return fmt.Errorf("http %s: %s", shown, reason(err, begun))
		}
		defer resp.Body.Close()
		if resp.StatusCode >= 200 && resp.StatusCode < 400 {
			// A short body is here already or about to be; an endless one
			// (an event stream) is not waited for.
			if resp.ContentLength > 0 && resp.ContentLength <= maxRead {
				_, _ = io.CopyN(io.Discard, resp.Body, maxRead)
			}
			return nil
		}
		body := make([]byte, maxBody)
		n, _ := io.ReadFull(resp.Body, body)
		if text := words(body[:n]); text != "" {
			return fmt.Errorf("http %s: %s: %s", shown, words([]byte(resp.Status)), text)
		}
		return fmt.Errorf("http %s: %s", shown, words([]byte(resp.Status)))
	}
	return try, tr.CloseIdleConnections, nil
}
