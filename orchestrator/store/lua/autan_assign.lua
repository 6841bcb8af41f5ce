-- autan_assign: the leader places queued requests on a prefill and a decode instance.
-- ARGV  leader_id, leader_epoch, lease_ms, k (at most 64),
--       then k x (id, expected_epoch, p_inst, p_inc, d_inst, d_inc, p_blocks, d_blocks, capability,
--                 s_inst ("" = nobody), s_inc, s_blocks, s_wait_ms, s_capability);
--       S is to push the first s_blocks full blocks of the tokens from its cache to P, which waits for s_wait_ms at most
-- Reply OK, then k x (code, epoch): OK with the new epoch, else with the current one (0 when GONE):
--       STALE  another epoch; an instance that is missing, of another incarnation, not READY, or asked to drain
--       STATE  not QUEUED      GONE  no such request
--       | NOT_LEADER
-- Promise: the next epoch, state ASSIGNED, both loads charged, PREFILL in the inbox of P and EXPECT in that of D (one PREFILL
-- when they are the same), a lease until P picks: all of it or nothing, for each request by itself. LEND in the inbox of S
-- while that incarnation is current; otherwise there is no S.
local function assign_one(c, a, lease_ms)
  local r = load_request(c, a.id)
  if not r then return 'GONE', '0' end
  if r.epoch ~= a.epoch then return 'STALE', r.epoch end
  if r.state ~= 'QUEUED' then return 'STATE', r.epoch end
  if not (takes_work(c, a.p, a.p_inc) and takes_work(c, a.d, a.d_inc)) then return 'STALE', r.epoch end
  check_move(c, r, 'ASSIGNED')
  local known_n = journal_length(c, a.id)
  local lends = a.s ~= '' and a.s ~= a.p and is_current(c, a.s, a.s_inc)
  set(c, r, {
    state = 'ASSIGNED', epoch = next_epoch(r), holder = '', holder_inc = '', picked_ms = '',
    p = a.p, p_inc = a.p_inc, p_open = '1', p_blocks = a.p_blocks,
    p_tokens = text(tonumber(r.prompt_tokens) + known_n), known_n = text(known_n),
    d = a.d, d_inc = a.d_inc, d_open = '1', d_blocks = a.d_blocks, capability = a.capability,
    s = lends and a.s or '', s_inc = a.s_inc, s_blocks = a.s_blocks, s_wait_ms = a.s_wait_ms,
    s_capability = a.s_capability,
  })
  enter_roles(c, r)
  redis.call('ZREM', k(c, 'ready'), a.id)
  redis.call('ZADD', k(c, 'lease'), text(c.now + lease_ms), a.id)
  if a.p ~= a.d then push(c, a.d, a.d_inc, 'expect', a.id, r.epoch) end
  push(c, a.p, a.p_inc, 'prefill', a.id, r.epoch)
  if lends then
    push(c, a.s, a.s_inc, 'lend', a.id, r.epoch)
    count(c, 'prefix_sources')
  end
  count(c, 'assigned')
  return 'OK', r.epoch
end

local function autan_assign(keys, args)
  local c = open('autan_assign', keys, args)
  local leader = take_name(c, 'leader_id')
  local leader_epoch = take_epoch(c, 'leader_epoch')
  local lease_ms = take_int(c, 'lease_ms', 0)
  local wanted = {}
  for at = 1, take_int(c, 'k', 0, 64) do
    wanted[at] = {
      id = take_name(c, 'id'), epoch = take_epoch(c, 'expected_epoch'),
      p = take_name(c, 'p_inst'), p_inc = take_epoch(c, 'p_inc'),
      d = take_name(c, 'd_inst'), d_inc = take_epoch(c, 'd_inc'),
      p_blocks = text(take_int(c, 'p_blocks', 0)), d_blocks = text(take_int(c, 'd_blocks', 0)),
      capability = take_bytes(c, 'capability'),
      s = take_optional_name(c, 's_inst'), s_inc = take_epoch(c, 's_inc'),
      s_blocks = text(take_int(c, 's_blocks', 0)), s_wait_ms = text(take_int(c, 's_wait_ms', 0)),
      s_capability = take_bytes(c, 's_capability'),
    }
  end
  taken_all(c)
  if not leads(c, leader, leader_epoch) then return {'NOT_LEADER'} end
  local reply = {'OK'}
  for _, a in ipairs(wanted) do
    local code, epoch = assign_one(c, a, lease_ms)
    reply[#reply + 1] = code
    reply[#reply + 1] = epoch
  end
  return reply
end
redis.register_function{function_name = 'autan_assign', callback = autan_assign, flags = {'allow-oom'}}
