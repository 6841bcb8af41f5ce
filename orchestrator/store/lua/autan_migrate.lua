-- autan_migrate: begins to move decoding requests to other instances, while they decode on.
-- ARGV  leader_id ("" = an operator), leader_epoch, max_migrations, k (at most 64),
--       then k x (id, expected_epoch, target, target_inc, blocks, move_epoch, capability, why, note);
--       at least the blocks that are charged at D are charged at the target; the capability is signed for move_epoch;
--       why (a name) and note (at most 256 bytes) are for the log of moves
-- Reply OK, then k x (code, epoch of the move; 0 unless OK or DUPLICATE):
--       DUPLICATE  this very move is open already      STALE  another epoch, move_epoch is not the next to be
--                                                      given out, or the target takes no work
--       STATE      not DECODING, on the target already, or another move is open
--       FULL       max_migrations moves of it were begun      GONE  no such request
--       | NOT_LEADER
-- Promise: MOVE in the inbox of D, ARRIVE in that of the target, the target's load charged: all of it or nothing, for each
-- request by itself. The request's own epoch, state and holder stay until the target takes over by handoff.
local function migrate_one(c, a, max_migrations)
  local r = load_request(c, a.id)
  if not r then return 'GONE', '0' end
  if r.epoch ~= a.epoch then return 'STALE', '0' end
  if r.state ~= 'DECODING' then return 'STATE', '0' end
  if r.m_open == '1' then
    if r.m == a.m and r.m_inc == a.m_inc then return 'DUPLICATE', r.m_epoch end
    return 'STATE', '0'
  end
  if r.d == a.m then return 'STATE', '0' end
  if next_epoch(r) ~= a.m_epoch or not takes_work(c, a.m, a.m_inc) then return 'STALE', '0' end
  local moves = tonumber(r.moves) or 0
  if moves >= max_migrations then return 'FULL', '0' end
  set(c, r, {
    m = a.m, m_inc = a.m_inc, m_open = '1', m_epoch = a.m_epoch, m_capability = a.capability, m_why = a.why,
    m_blocks = text(math.max(tonumber(a.blocks), tonumber(r.d_blocks))),
    m_known = text(journal_length(c, a.id)), moves = text(moves + 1),
  })
  charge(c, r.m, 'd', 1, r.m_blocks)
  redis.call('SADD', k_parts(c, r.m, r.m_inc), r.id)
  push(c, r.m, r.m_inc, 'arrive', r.id, r.m_epoch)
  push(c, r.d, r.d_inc, 'move', r.id, r.m_epoch)
  count_move(c, r, 1)
  note_move(c, r, 'begun', a.note)
  count(c, 'migrations_begun')
  return 'OK', r.m_epoch
end

local function autan_migrate(keys, args)
  local c = open('autan_migrate', keys, args)
  local leader = take_bytes(c, 'leader_id')
  local leader_epoch = take_epoch(c, 'leader_epoch')
  local max_migrations = take_int(c, 'max_migrations', 0)
  local wanted = {}
  for at = 1, take_int(c, 'k', 0, 64) do
    wanted[at] = {
      id = take_name(c, 'id'), epoch = take_epoch(c, 'expected_epoch'),
      m = take_name(c, 'target'), m_inc = take_epoch(c, 'target_inc'), blocks = text(take_int(c, 'blocks', 0)),
      m_epoch = take_epoch(c, 'move_epoch'), capability = take_bytes(c, 'capability'),
      why = take_name(c, 'why'), note = take_bytes(c, 'note'),
    }
    if #wanted[at].note > NOTE_BYTES then refuse(c, 'note is longer than ' .. NOTE_BYTES .. ' bytes') end
  end
  taken_all(c)
  if leader ~= '' and not leads(c, leader, leader_epoch) then return {'NOT_LEADER'} end
  local reply = {'OK'}
  for _, a in ipairs(wanted) do
    local code, epoch = migrate_one(c, a, max_migrations)
    reply[#reply + 1] = code
    reply[#reply + 1] = epoch
  end
  return reply
end
redis.register_function{function_name = 'autan_migrate', callback = autan_migrate, flags = {'allow-oom'}}
