-- autan_pick: an instance reads its inbox.
-- ARGV  instance_id, incarnation, ack_seq, max_n (at most 64), lease_ms
-- Reply OK, now_ms, k, k x (seq, kind, id, epoch, spec, journal, peer_inst, peer_addr, peer_inc,
--       ingress_id, ingress_addr, ingress_epoch, submitted_ms, attempts, capability,
--       source_inst, source_inc, source_blocks, source_wait_ms) | STALE | GONE
--       prefill  compute it; the peer decodes (itself: do both). The caller holds the request from now on, under a lease.
--                The source, if there is one, pushes cached blocks of it here first.
--       lend     push the first source_blocks full blocks of its tokens from the cache to the peer, which prefills it
--       expect   the peer prefills and hands over
--       revoke   drop the request up to this epoch; also told of a prefill or expect that ended before it was read
--       owner    send what is not acknowledged to this ingress
--       move     the caller decodes it: copy its KV to the peer meanwhile, under this epoch, and let it take over
--       arrive   the peer decodes it and moves it here under this epoch
--       stay     the move of this epoch is over: decode on
--       Only a prefill, a lend and a move have a capability.
--       revoke, stay and owner have no spec, journal or peer; a revoke or stay has no ingress.
--       The journal of prefill and expect is what was journaled when assign placed the request, that of move and arrive when
--       the move began: the same for both sides.
-- Promise: entries up to ack_seq are dropped, later ones are told again until then, in order, without another effect.
-- Fewer than max_n entries do not mean that the inbox is empty: a reply holds at most 8 MiB unless one entry is larger.
-- What an entry means now: the kind to tell, or nil when there is nothing to tell any more.
local function meaning(r, kind, epoch, instance, incarnation)
  if kind == 'revoke' then return 'revoke' end
  local moving = r and r.m_open == '1' and r.m_epoch == epoch
  local arriving = moving and is_part(r, 'm', instance, incarnation)
  if kind == 'arrive' then
    if arriving then return 'arrive' end
    -- Committed: the caller knows it, for it took over.
    return not (r and r.epoch == epoch and is_part(r, 'd', instance, incarnation)) and 'revoke' or nil
  end
  if kind == 'move' then return moving and is_part(r, 'd', instance, incarnation) and 'move' or nil end
  if kind == 'stay' then
    return r and not moving and r.epoch ~= epoch and is_part(r, 'd', instance, incarnation) and 'stay' or nil
  end
  if kind == 'owner' and arriving then return 'owner' end
  local current = r and r.epoch == epoch
  if kind == 'lend' then
    local waits = current and (r.state == 'ASSIGNED' or r.state == 'PREFILLING')
    return waits and is_part(r, 's', instance, incarnation) and 'lend' or nil
  end
  if kind == 'owner' then
    local party = current and (is_part(r, 'p', instance, incarnation) or is_part(r, 'd', instance, incarnation))
    return party and LIVE[r.state] and 'owner' or nil
  end
  if not current or not PLACED[r.state] then return 'revoke' end
  if not is_part(r, kind == 'prefill' and 'p' or 'd', instance, incarnation) then return 'revoke' end
  -- DECODING: the caller knows it, for it took part in the hand-off.
  return r.state ~= 'DECODING' and kind or nil
end

local function hold(c, r, instance, incarnation, lease_ms)
  if r.state == 'ASSIGNED' then
    check_move(c, r, 'PREFILLING')
    set(c, r, {state = 'PREFILLING', holder = instance, holder_inc = incarnation, picked_ms = text(c.now)})
  end
  redis.call('ZADD', k(c, 'lease'), text(c.now + lease_ms), r.id)
end

local PEERS = {prefill = 'd', expect = 'p', move = 'm', arrive = 'd', lend = 'p'}
local SHOWN = {prefill = 'capability', move = 'm_capability', lend = 's_capability'}

local function source_of(r, kind)
  if r.s == '' or not (kind == 'prefill' or kind == 'lend') then return {'', '', '', ''} end
  return {r.s, r.s_inc, r.s_blocks, r.s_wait_ms}
end

local function entry_reply(c, seq, kind, id, epoch, r)
  if kind == 'revoke' or kind == 'stay' then return {seq, kind, id, epoch, '', '', '', '', '', '', '', '', '', '', '', '', '', '', ''} end
  local spec, journal, peer, peer_addr, peer_inc, capability = '', '', '', '', '', ''
  if kind ~= 'owner' then
    local side = PEERS[kind]
    peer, peer_inc = r[side], r[side .. '_inc']
    peer_addr = redis.call('HGET', k_instance(c, peer), 'addr') or ''
    spec = redis.call('HGET', k_request(c, id), 'spec') or ''
    local shown = SHOWN[kind]
    capability = shown and redis.call('HGET', k_request(c, id), shown) or ''
    local known_n = (kind == 'move' or kind == 'arrive') and r.m_known or r.known_n
    -- As it was at assign: P may have had its first token journaled before D reads, and both must count the same rows.
    if known_n ~= '0' then journal = redis.call('GETRANGE', k_journal(c, id), 0, 4 * tonumber(known_n) - 1) end
  end
  return {
    seq, kind, id, epoch, spec, journal, peer, peer_addr, peer_inc,
    r.ing, r.ing_addr, r.ing_epoch, r.submitted_ms, r.attempts, capability, unpack(source_of(r, kind)),
  }
end

local function autan_pick(keys, args)
  local c = open('autan_pick', keys, args)
  local instance = take_name(c, 'instance_id')
  local incarnation = take_epoch(c, 'incarnation')
  local ack_seq = take_int(c, 'ack_seq', 0)
  local max_n = take_int(c, 'max_n', 1, 64)
  local lease_ms = take_int(c, 'lease_ms', 0)
  taken_all(c)
  if redis.call('EXISTS', k_instance(c, instance)) == 0 then return {'GONE'} end
  if not is_current(c, instance, incarnation) then return stale(c) end
  local inbox = k_inbox(c, instance)
  redis.call('ZREMRANGEBYSCORE', inbox, '-inf', text(ack_seq))
  local entries = redis.call('ZRANGE', inbox, 0, max_n - 1, 'WITHSCORES')
  local reply, told, bytes = {'OK', text(c.now), 0}, 0, 0
  for at = 1, #entries, 2 do
    local kind, id, epoch = string.match(entries[at], '^(%l+)|(.*)|(%d+)$')
    local r = load_request(c, id)
    local told_kind = meaning(r, kind, epoch, instance, incarnation)
    if not told_kind then
      redis.call('ZREM', inbox, entries[at])
    else
      local fields = entry_reply(c, entries[at + 1], told_kind, id, epoch, r)
      bytes = bytes + #fields[5] + #fields[6]
      if told > 0 and bytes > PICK_BYTES then break end
      if told_kind == 'prefill' then hold(c, r, instance, incarnation, lease_ms) end
      for _, field in ipairs(fields) do reply[#reply + 1] = field end
      told = told + 1
    end
  end
  reply[3] = told
  return reply
end
redis.register_function{function_name = 'autan_pick', callback = autan_pick, flags = {'allow-oom'}}
