package results

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// maxSameSecond bounds the search for a free name among records of one second.
const maxSameSecond = 10_000

// Save writes rec as a new file in dir, which must exist, and returns its path:
// <incident>-<time>.json with the time in UTC that rec started (or now, if it
// does not say), and -2, -3 and so on before the dot if that name is taken. It
// never overwrites.
//
// The file appears under its name with all its content or not at all, whenever
// the process is killed; power loss is another matter. Where the file system has
// no O_TMPFILE, a kill may leave a hidden temporary file beside it.
//
// A file written by root is given to the owner of dir, so that a run under sudo
// leaves nothing in a checkout that its owner cannot remove.
func Save(dir string, rec *Record) (string, error) {
	data, err := encode(rec)
	if err != nil {
		return "", err
	}
	d, err := newDraft(dir)
	if err != nil {
		return "", fmt.Errorf("saving the record: %w", err)
	}
	path, err := d.publish(data, baseName(dir, rec))
	if err = errors.Join(err, d.discard()); err != nil {
		return "", fmt.Errorf("saving the record: %w", err)
	}
	return path, nil
}

// baseName is the path of the new file without "-n.json".
func baseName(dir string, rec *Record) string {
	started := rec.Started
	if started.IsZero() {
		started = time.Now()
	}
	return filepath.Join(dir, rec.Incident+"-"+started.UTC().Format("20060102T150405Z"))
}

// A draft is a file in a directory that has no name of its own yet, or a
// temporary one.
type draft struct {
	file *os.File
	temp string // its temporary name, if it has one
}

// newDraft makes an unnamed file in dir or, where the file system cannot, one
// with a temporary name.
func newDraft(dir string) (*draft, error) {
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_WRONLY, 0o644)
	// open(2): EOPNOTSUPP from a file system without O_TMPFILE, EISDIR from a
	// kernel without.
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		return newNamedDraft(dir)
	}
	if err != nil {
		return nil, err
	}
	return &draft{file: f}, nil
}

func newNamedDraft(dir string) (*draft, error) {
	temp := filepath.Join(dir, ".record-"+rand.Text()+".tmp")
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	return &draft{file: f, temp: temp}, nil
}

// publish fills the draft and gives it the first free name that starts with base.
func (d *draft) publish(data []byte, base string) (string, error) {
	if _, err := d.file.Write(data); err != nil {
		return "", err
	}
	if err := giveToOwnerOf(filepath.Dir(base), d.file); err != nil {
		return "", err
	}
	path := base + ".json"
	for n := 2; n <= maxSameSecond; n++ {
		err := d.link(path)
		if !errors.Is(err, fs.ErrExist) {
			return path, err
		}
		path = fmt.Sprintf("%s-%d.json", base, n)
	}
	return "", fmt.Errorf("%s.json and %d more names are taken", base, maxSameSecond-1)
}

// link names the draft; it fails with fs.ErrExist if the name is taken.
func (d *draft) link(path string) error {
	if d.temp != "" {
		return os.Link(d.temp, path)
	}
	// The way that open(2) shows for O_TMPFILE; AT_EMPTY_PATH would need
	// CAP_DAC_READ_SEARCH.
	self := fmt.Sprintf("/proc/self/fd/%d", d.file.Fd())
	if err := unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.LinkError{Op: "linkat", Old: self, New: path, Err: err}
	}
	return nil
}

// discard closes the draft and takes away its temporary name.
func (d *draft) discard() error {
	err := d.file.Close()
	if d.temp != "" {
		err = errors.Join(err, os.Remove(d.temp))
	}
	return err
}

// giveToOwnerOf makes the owner of dir the owner of f if the process is root.
// Others cannot give files away, and theirs are their own already.
func giveToOwnerOf(dir string, f *os.File) error {
	if os.Geteuid() != 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: dir, Err: err}
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}
