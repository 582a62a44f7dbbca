package server

import "bytes"

const databases = 16

// entrySize is about what a key takes besides its bytes: the entry, its value's slice and its places in the maps.
const entrySize = 112

// keyspace holds all keys.
type keyspace struct {
	dbs   [databases]db
	bytes int64 // keys once, since both maps share them, values and entrySize for each
}

type db struct {
	keys    map[string]*entry
	expires map[string]*entry // those that have an expireAt
}

type entry struct {
	key      string // that of both maps, which share its bytes
	value    []byte
	expireAt int64 // Unix milliseconds, 0 for never
}

func (k *keyspace) init() {
	for i := range k.dbs {
		k.dbs[i] = db{keys: map[string]*entry{}, expires: map[string]*entry{}}
	}
	k.bytes = 0
}

// lookup returns the entry of a key that has not expired, or nil. A key that has is removed, and expired is true.
func (k *keyspace) lookup(dbID int, key []byte, now int64) (e *entry, expired bool) {
	e = k.dbs[dbID].keys[string(key)]
	if e != nil && e.expireAt != 0 && e.expireAt <= now {
		k.remove(dbID, string(key))
		return nil, true
	}
	return e, false
}

// set stores a copy of the value. A value of about the old size goes into the old one's memory.
func (k *keyspace) set(dbID int, key, value []byte) *entry {
	d := &k.dbs[dbID]
	e := d.keys[string(key)]
	if e == nil {
		e = &entry{key: string(key)}
		d.keys[e.key] = e
		k.bytes += int64(len(key) + entrySize)
	}
	k.bytes -= int64(cap(e.value))
	if cap(e.value) >= len(value) && cap(e.value) <= 2*len(value)+64 {
		e.value = append(e.value[:0], value...)
	} else {
		e.value = bytes.Clone(value)
	}
	k.bytes += int64(cap(e.value))
	return e
}

// expireAt sets or, with 0, takes away the time at which a key expires.
func (k *keyspace) expireAt(dbID int, e *entry, at int64) {
	d := &k.dbs[dbID]
	switch {
	case at != 0:
		d.expires[e.key] = e
	case e.expireAt != 0:
		delete(d.expires, e.key)
	}
	e.expireAt = at
}

func (k *keyspace) remove(dbID int, key string) {
	d := &k.dbs[dbID]
	e := d.keys[key]
	if e == nil {
		return
	}
	delete(d.keys, key)
	if e.expireAt != 0 {
		delete(d.expires, key)
	}
	k.bytes -= int64(len(key) + entrySize + cap(e.value))
}

// expireSome looks at up to n keys that expire some time, removes those whose time has come and returns their number.
// Which keys it looks at is left to the map's random order.
func (k *keyspace) expireSome(dbID int, now int64, n int) (gone int) {
	for key, e := range k.dbs[dbID].expires {
		if n--; n < 0 {
			break
		}
		if e.expireAt <= now {
			k.remove(dbID, key)
			gone++
		}
	}
	return gone
}
