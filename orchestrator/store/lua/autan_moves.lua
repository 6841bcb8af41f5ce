-- autan_moves: what became of the last moves of running requests, newest first.
-- ARGV  limit (at most 256)
-- Reply OK, now_ms, k, k x (at_ms, event: begun, moved or stayed, id, epoch of the move, from, to, why, note)
-- Promise: reads only.
local function autan_moves(keys, args)
  local c = open('autan_moves', keys, args)
  local limit = take_int(c, 'limit', 0, MOVE_RECORDS)
  taken_all(c)
  local found = limit > 0 and redis.call('LRANGE', k(c, 'moves'), 0, limit - 1) or {}
  local reply = {'OK', text(c.now), #found}
  for _, line in ipairs(found) do
    for _, value in ipairs({string.match(line, '^(%d+)|(%a+)|([^|]+)|(%d+)|([^|]*)|([^|]*)|([^|]*)|(.*)$')}) do
      reply[#reply + 1] = value
    end
  end
  return reply
end
redis.register_function{function_name = 'autan_moves', callback = autan_moves, flags = {'no-writes'}}
